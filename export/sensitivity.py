"""What int8 or int4 costs at each matrix: the KL divergence from float32 when that one alone is quantized.

All of it runs in one session, over `gates`. A mixture that keeps within a budget is found there too, by halving.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from pastkey import names
from pastkey.errors import QualityError

from .calibrate import probing
from .evaluate import Ids, log_softmax, top1_agreement
from .gates import GATES, Matrix, add_gates, gates
from .gptq import FourBit

_ROWS = 64  # positions that are compared at once, for a core each
_MOST = 700.0  # nats: e to it is still a float64


@dataclass(frozen=True)
class Row:
    """One quantized matrix among float32."""

    weight: str  # the initializer's name
    shape: tuple[int, ...]
    kl_divergence: float  # from float32 in nats, mean over positions
    top1_agreement: float  # share of positions, 0 to 1
    share: float  # of the bytes of all matrices, 0 to 1
    product: bool  # multiplied by; an embedding that is not the output head is gathered only


@dataclass(frozen=True)
class Sensitivity:
    """The table, and what a budget asks for."""

    kl_divergence: float  # of everything quantized, in nats
    rows: tuple[Row, ...]  # worst first
    ranking: tuple[str, ...] = ()  # in the order in which they are given more bits; of int4, what is 4-bit
    keep: tuple[str, ...] = ()  # the first of these, without which the budget is met

    def worst(self, count: int) -> tuple[str, ...]:
        """The first `count` of the ranking, or all."""
        return self.ranking[:count]

    @property
    def most_kept(self) -> int:
        """How many may stay in float32 at most: one is left, or int8 would be but a name."""
        return len(self.ranking) - 1

    def to_json(self) -> dict[str, Any]:
        return {"kl_divergence": self.kl_divergence, "matrices": [asdict(row) for row in self.rows]}


_NONE: Mapping[str, FourBit] = {}


def sensitivity(
    model: ir.Model,
    folder: Path,
    windows: Sequence[Ids],
    max_kl: float | None = None,
    *,
    int4: Mapping[str, FourBit] = _NONE,
) -> Sensitivity:
    """Measures every matrix of a float32 graph on windows (T,) of token ids. Changes `model`.

    `folder` holds the weights file that the graph names. With `max_kl`, in nats, `keep` is as many of the worst
    ones as must stay in float32. With the matrices of `int4`, by the names of initializers, those are ranked, and
    by what they cost per weight: a bit buys most where a small matrix costs much. Raises QualityError where all but one
    do not suffice, for that would be float32, and of int4 where all do not: embeddings and output head are int8 there.
    """
    with _opened(model, folder, windows, int4) as mixture:
        whole, _ = mixture.measure(matrix.weight for matrix in mixture.matrices)
        total = sum(matrix.bytes for matrix in mixture.matrices)
        rows = [
            Row(m.weight, m.shape, *mixture.measure([m.weight]), share=m.bytes / total, product=m.product)
            for m in mixture.matrices
        ]
        rows.sort(key=lambda row: -row.kl_divergence)  # stable: equal ones in the graph's order
        found = Sensitivity(whole, tuple(rows), _ranking(rows, int4))
        if max_kl is None or whole <= max_kl:
            return found
        return replace(found, keep=_fewest(found, mixture.measure, max_kl, "int4" if int4 else "int8"))


def _ranking(rows: list[Row], int4: Mapping[str, FourBit]) -> tuple[str, ...]:
    if int4:
        ranked = sorted((row for row in rows if row.weight in int4), key=lambda row: -row.kl_divergence / row.share)
    else:
        ranked = rows
    return tuple(row.weight for row in ranked)


def _fewest(
    found: Sensitivity, measure: Callable[[Iterable[str]], tuple[float, float]], max_kl: float, precision: str
) -> tuple[str, ...]:
    """The worst matrices without which the quantized rest keeps within the budget, by halving."""

    def left(count: int) -> float:
        kept = frozenset(found.worst(count))
        return measure(row.weight for row in found.rows if row.weight not in kept)[0]

    few, many = 0, found.most_kept if precision == "int8" else len(found.ranking)  # too few, and enough
    if left(many) > max_kl:
        raise missed(left(many), max_kl, precision, f"with {many} of {len(found.ranking)} matrices in float32")
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if left(middle) <= max_kl else (middle, many)
    return found.worst(many)


def missed(kl: float, max_kl: float, precision: str, how: str) -> QualityError:
    """The sentence for a budget that cannot be met."""
    better = {"int4": "int8", "int8": "fp32"}[precision]
    return QualityError(
        f"{precision} is {kl:.3g} nats from float32 {how}, over --max-kl {max_kl:g} by {kl - max_kl:.2g}: allow more, "
        f"or export with --precision {better}"
    )


class _Exact:
    """Logits (T, V) that others are compared with many times: six times as fast as `evaluate` does it."""

    def __init__(self, logits: np.ndarray) -> None:
        self._logits = logits
        self._p = np.exp(log_softmax(logits)).astype(np.float32)

    def figures(self, logits: np.ndarray) -> tuple[float, float]:
        """KL divergence in nats and top-1 agreement of (T, V).

        With d the differences of the logits less their mean under p, KL(p || q) = log sum p e^d, and that is
        log(1 + sum p (e^d - 1 - d)): of terms that are all positive, so that nothing cancels however small it is.
        """
        d = logits - self._logits
        d -= np.einsum("tv,tv->t", self._p, d)[:, None]
        wide = np.minimum(d, _MOST).astype(np.float64)
        terms = np.expm1(wide)
        terms -= wide
        kl = np.log1p(np.einsum("tv,tv->t", self._p, terms))
        return float(kl.mean()), top1_agreement(self._logits, logits)


class _Mixture:
    """A graph with gates, and what it gives with all of them closed."""

    def __init__(
        self,
        matrices: tuple[Matrix, ...],
        windows: Sequence[Ids],
        run: Callable[..., np.ndarray],
        pool: ThreadPoolExecutor,
    ) -> None:
        self.matrices, self._windows, self._run, self._pool = matrices, windows, run, pool
        exact = (run(ids, gates(matrices, ())) for ids in windows)  # each (T, V)
        self._exact = [
            [_Exact(logits[start : start + _ROWS]) for start in range(0, len(logits), _ROWS)] for logits in exact
        ]

    def measure(self, quantized: Iterable[str]) -> tuple[float, float]:
        """KL divergence in nats and top-1 agreement, means over positions, with these weights quantized."""
        chosen = gates(self.matrices, quantized)
        pairs = [
            (exact, logits[place * _ROWS : (place + 1) * _ROWS])
            for ids, parts in zip(self._windows, self._exact, strict=True)
            for logits in [self._run(ids, chosen)]
            for place, exact in enumerate(parts)
        ]
        found = list(self._pool.map(lambda pair: pair[0].figures(pair[1]), pairs))
        kl, top1 = np.average(found, axis=0, weights=[len(logits) for _, logits in pairs])
        return float(kl), float(top1)


@contextlib.contextmanager
def _opened(model: ir.Model, folder: Path, windows: Sequence[Ids], int4: Mapping[str, FourBit]) -> Iterator[_Mixture]:
    matrices = add_gates(model, int4)
    with probing(model, folder, [names.LOGITS]) as probe, ThreadPoolExecutor(os.cpu_count()) as pool:
        yield _Mixture(matrices, windows, lambda ids, chosen: probe(ids, {GATES: chosen})[names.LOGITS], pool)

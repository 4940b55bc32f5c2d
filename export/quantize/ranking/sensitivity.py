"""Sensitivity: the KL divergence from float32 with only one matrix quantized, for each matrix.

Everything runs in one session, over a graph with `switches`. A binary search in that session finds which matrices need
more bits to meet a budget.
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

from pastkey.contract import names
from pastkey.errors import QualityError
from pastkey.precisions import PRECISIONS

from ...graph.blocks import Blocks
from ...measure.metrics import Ids, Logits, kl_by_position, softmax, top1_agreement
from ...progress import SILENT, Progress
from ..calibrate.activations import probing
from ..rounding.rewrite import NONE_ROUNDED
from .switches import SWITCHES, Matrix, add_switches, quantization_mask

_PART = 64  # positions that one core compares at once


@dataclass(frozen=True)
class MatrixCost:
    """The figures of one quantized matrix, with all others in float32."""

    weight: str  # the initializer's name
    shape: tuple[int, ...]
    kl_divergence: float  # from float32 in nats, mean over positions
    top1_agreement: float  # share of positions, 0 to 1
    share: float  # of the bytes of all matrices, 0 to 1
    matmul: bool  # whether a MatMul reads it; false for an embedding that is not the output head


@dataclass(frozen=True)
class Sensitivity:
    """The table of all matrices, and the matrices that a budget requires in more bits."""

    kl_divergence: float  # with everything quantized, in nats
    rows: tuple[MatrixCost, ...]  # most sensitive first
    ranking: tuple[str, ...] = ()  # in the order in which they get more bits; only those below 8 bits, if there are any
    keep: tuple[str, ...] = ()  # the first of these, as many as the budget requires

    def worst(self, count: int) -> tuple[str, ...]:
        """Returns the first `count` of the ranking, or all."""
        return self.ranking[:count]

    @property
    def most_kept(self) -> int:
        """The maximum number that may stay in float32: all but one, since otherwise nothing would be int8."""
        return len(self.ranking) - 1

    def to_json(self) -> dict[str, Any]:
        return {"kl_divergence": self.kl_divergence, "matrices": [asdict(row) for row in self.rows]}


def sensitivity(
    model: ir.Model,
    folder: Path,
    windows: Sequence[Ids],
    max_kl: float | None = None,
    *,
    precision: str = "int8",
    rounded: Mapping[str, Blocks] = NONE_ROUNDED,
    progress: Progress = SILENT,
) -> Sensitivity:
    """Measures the sensitivity of every matrix of a float32 graph.

    Args:
        model: The graph; changed.
        folder: Holds the weights file that the graph names.
        windows: Token ids (T,) to measure on.
        max_kl: The budget in nats: `keep` lists as many of the most sensitive matrices as must have more bits.
        precision: Of the matrices.
        rounded: Matrices of fewer than 8 bits, by initializer name; all others are int8. Only these are ranked, by
            sensitivity per weight, so that the fewest weights get more bits.
        progress: Receives the number of matrices measured.

    Raises:
        QualityError: The budget is missed with all matrices but one in float32; or with all of `rounded` in int8, as
            embeddings and the output head are.
        InputError: A weight holds NaN or infinity.
    """
    with _opened(model, folder, windows, rounded) as switched:
        whole, _ = switched.measure(matrix.weight for matrix in switched.matrices)
        total = sum(matrix.bytes for matrix in switched.matrices)
        rows = []
        for m in switched.matrices:
            rows.append(
                MatrixCost(m.weight, m.shape, *switched.measure([m.weight]), share=m.bytes / total, matmul=m.matmul)
            )
            progress.advance(len(rows), len(switched.matrices))
        rows.sort(key=lambda row: -row.kl_divergence)  # stable: equal ones keep the graph's order
        found = Sensitivity(whole, tuple(rows), _ranking(rows, rounded))
        if max_kl is None or whole <= max_kl:
            return found
        most = len(found.ranking) if rounded else found.most_kept
        return replace(found, keep=_fewest(found, switched.measure, max_kl, precision, most))


def _ranking(rows: list[MatrixCost], rounded: Mapping[str, Blocks]) -> tuple[str, ...]:
    if rounded:
        ranked = sorted((row for row in rows if row.weight in rounded), key=lambda row: -row.kl_divergence / row.share)
    else:
        ranked = rows
    return tuple(row.weight for row in ranked)


def _fewest(
    found: Sensitivity,
    measure: Callable[[Iterable[str]], tuple[float, float]],
    max_kl: float,
    precision: str,
    most: int,
) -> tuple[str, ...]:
    """Returns the fewest of the most sensitive matrices that must stay out for the budget, by binary search."""

    def left(count: int) -> float:
        kept = frozenset(found.worst(count))
        return measure(row.weight for row in found.rows if row.weight not in kept)[0]

    few, many = 0, most  # too few, and enough
    if left(many) > max_kl:
        raise missed(left(many), max_kl, precision, many, len(found.ranking))
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if left(middle) <= max_kl else (middle, many)
    return found.worst(many)


def missed(kl: float, max_kl: float, precision: str, raised: int, ranked: int) -> QualityError:
    """Returns the error for a budget that cannot be met with `raised` of the ranked matrices in more bits."""
    finer = PRECISIONS[precision].finer
    return QualityError(
        f"{precision} is {kl:.3g} nats from float32 with {raised} of {ranked} matrices in {finer}, over --max-kl "
        f"{max_kl:g} by {kl - max_kl:.2g}: allow more, or export with --precision {finer}"
    )


class _Float32:
    """Reference logits (T, V) for many comparisons: their softmax is computed once."""

    def __init__(self, logits: Logits) -> None:
        self._logits, self._p = logits, softmax(logits)

    def figures(self, logits: Logits) -> tuple[float, float]:
        """Returns the KL divergence in nats and the top-1 agreement of (T, V)."""
        kl = kl_by_position(self._logits, self._p, logits)
        return float(kl.mean()), top1_agreement(self._logits, logits)


class _SwitchedGraph:
    """A graph with switches, and its logits with all matrices in float32."""

    def __init__(
        self,
        matrices: tuple[Matrix, ...],
        windows: Sequence[Ids],
        run: Callable[..., np.ndarray],
        pool: ThreadPoolExecutor,
    ) -> None:
        self.matrices, self._windows, self._run, self._pool = matrices, windows, run, pool
        fp32 = (run(ids, quantization_mask(matrices, ())) for ids in windows)  # each (T, V)
        self._fp32 = [
            [_Float32(logits[start : start + _PART]) for start in range(0, len(logits), _PART)] for logits in fp32
        ]

    def measure(self, quantized: Iterable[str]) -> tuple[float, float]:
        """Returns KL divergence in nats and top-1 agreement, means over positions, with these weights quantized."""
        mask = quantization_mask(self.matrices, quantized)
        pairs = [
            (fp32, logits[place * _PART : (place + 1) * _PART])
            for ids, parts in zip(self._windows, self._fp32, strict=True)
            for logits in [self._run(ids, mask)]
            for place, fp32 in enumerate(parts)
        ]
        found = list(self._pool.map(lambda pair: pair[0].figures(pair[1]), pairs))
        kl, top1 = np.average(found, axis=0, weights=[len(logits) for _, logits in pairs])
        return float(kl), float(top1)


@contextlib.contextmanager
def _opened(
    model: ir.Model, folder: Path, windows: Sequence[Ids], rounded: Mapping[str, Blocks]
) -> Iterator[_SwitchedGraph]:
    matrices = add_switches(model, rounded)
    with probing(model, folder, [names.LOGITS]) as probe, ThreadPoolExecutor(os.cpu_count()) as pool:
        yield _SwitchedGraph(matrices, windows, lambda ids, mask: probe(ids, {SWITCHES: mask})[names.LOGITS], pool)

"""Parity: what the runtime computes from a bundle, step by step, against an uncached run.

The reference is the module that was exported, run without a cache in torch; or, for a bundle alone, int8 and int4, the
bundle's own uncached run. What verifies is what ships: every figure comes out of `pastkey.runtime`.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pastkey.bundle import Bundle
from pastkey.errors import ParityError
from pastkey.runtime import Generation, Session

from .evaluate import Logits, kl_divergence, own_text, relative_difference, top1_agreement
from .observe import Layer, run_uncached

Ids = npt.NDArray[np.int64]

# --- tolerances and sizes, in this one place ----------------------------------------------------------------------
# max |difference| over max |logit|. State it relative: torch and onnxruntime in float32 differ by 9e-5 at logits of 44.
MAX_RELATIVE_DIFFERENCE = 1e-5
# A deep module can be further than that from itself: torch in float32 from torch in float64. Then the limit is so many
# times the distance measured on the same text.
ROUNDING_ALLOWANCE = 3
# int8 decoded token by token takes another path through attention than int8 prefill; the last bits, amplified by int8
# activations, may cost no more than twice what int8 itself costs against float32 (nats): two roundings of one size are
# that far from each other. Or as much as rounding can explain. Most of what int4 costs is its weights', which are the
# same on every path: a tenth of int8's share.
DECODE_KL_ALLOWANCE = {"int8": 2, "int4": 0.2}
KL_FLOOR = 1e-6
# How far int8 and int4 may be from float32 at all (nats): an export beyond it has lost the model. Later, against the
# source, no further than twice what was measured at export.
MAX_KL = {"int8": 0.5, "int4": 1.0}
RECORDED_KL_ALLOWANCE = 2
TOKENS = 150  # length of the text that is compared, where the context has room for it
MAX_WINDOW, BEYOND_WINDOW = 1024, 16  # or so many tokens beyond a window, where it is no larger than this
RANDOM_TOKENS = 16  # at its beginning; the model itself writes the rest
CHUNK_SIZES = (7, 64)  # the check "decode" is chunks of one
GREEDY_TOKENS = 64
BATCH_LENGTH = 40  # the longest row of the batch
BATCH_STEPS = 4  # tokens decoded after it


@dataclass(frozen=True)
class Check:
    """One comparison: its figure, and the limit that it had to keep."""

    name: str
    ok: bool
    measure: str  # "max_relative_difference", "mean_kl" (nats) or "first_difference" (of the token ids, or null)
    value: float | int | None
    limit: float | None
    detail: str = ""


@dataclass(frozen=True)
class Verification:
    """All checks of one bundle, and int8's or int4's distance from float32 where the source was at hand."""

    reference: str  # "source" or "own uncached run"
    tokens: int
    checks: tuple[Check, ...]
    quality: dict[str, float]  # kl_divergence (nats), top1_agreement (share)

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        checks = {check.name: {k: v for k, v in asdict(check).items() if k != "name"} for check in self.checks}
        return {"ok": self.ok, "reference": self.reference, "tokens": self.tokens, "checks": checks} | self.quality

    def require_ok(self, what: str) -> None:
        """Raises ParityError naming the first check that failed."""
        failed = next((check for check in self.checks if not check.ok), None)
        if failed is not None:
            raise ParityError(f"{what} does not compute what its source computes: {failed.detail}")


# --- the reference ------------------------------------------------------------------------------------------------
Cache = tuple[tuple[Logits, Logits], ...]  # per layer, keys and values (K, T, D)


class Reference(Protocol):
    """One text of T tokens in a single run without a past."""

    def logits(self, ids: Ids) -> Logits: ...  # (T, V)

    def cache(self, ids: Ids) -> Cache: ...


class ModuleReference:
    """The module in torch, as its author wrote it: a Hugging Face decoder with transformers' own attention."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def logits(self, ids: Ids) -> Logits:
        return self._logits(self._module, ids)

    def cache(self, ids: Ids) -> Cache:
        run = run_uncached(self._module, torch.from_numpy(ids[None]))
        return tuple((k[0].numpy(), v[0].numpy()) for k, v in zip(run.keys, run.values, strict=True))

    def rounding(self, ids: Ids) -> float:
        """max |difference| over max |logit| between the module in float64 and in float32; 0 where it has no float64."""
        try:
            exact = self._logits(copy.deepcopy(self._module).double(), ids)
        except Exception:  # whatever a user's module raises in a precision that it was not written for
            return 0.0
        return relative_difference(exact, self.logits(ids))

    def _logits(self, module: nn.Module, ids: Ids) -> Logits:
        with getattr(module, "native", contextlib.nullcontext)():
            logits: Logits = run_uncached(module, torch.from_numpy(ids[None])).logits[0].numpy()
        return logits


class OwnReference:
    """The bundle's common graph, all tokens in one run."""

    def __init__(self, bundle: Bundle) -> None:
        self._session = Session(bundle, graph="common")
        self._layers = len(bundle.manifest.layers)

    def logits(self, ids: Ids) -> Logits:
        self._session.reset()
        logits: Logits = self._session.forward(ids[None])[0]
        return logits

    def cache(self, ids: Ids) -> Cache:
        self.logits(ids)
        return tuple(_rows(self._session, i) for i in range(self._layers))


def _text(session: Session, length: int) -> Ids:
    """A text (T,): some random ids, and what the bundle itself writes after them.

    A model may repeat one token for ever, and attention over equal tokens gives the same whatever its weights.
    """
    beginning = min(RANDOM_TOKENS, -(-length // 2))
    ids: list[int] = np.random.default_rng(0).integers(0, session.manifest.vocab_size, beginning).tolist()
    return np.array(own_text(session, ids, length), np.int64)


def _rows(session: Session, layer: int) -> tuple[Logits, Logits]:
    keys, values = session.cache.layer(layer)
    return keys[0], values[0]


# --- verifying ----------------------------------------------------------------------------------------------------
def verify(bundle: Bundle, module: nn.Module | None = None, *, layers: tuple[Layer, ...] = ()) -> Verification:
    """Runs every check. `layers` name the attention calls in messages."""
    return _Verifier(bundle, module, layers).run()


class _Verifier:
    def __init__(self, bundle: Bundle, module: nn.Module | None, layers: tuple[Layer, ...]) -> None:
        self._bundle = bundle
        self._layers = layers
        self._context = bundle.manifest.context_length
        self._padding = bundle.manifest.padding
        self._common = Session(bundle, graph="common")
        self._last = Session(bundle, graph="last")
        windows = [layer.window + BEYOND_WINDOW for layer in layers if layer.window and layer.window <= MAX_WINDOW]
        self._ids = _text(self._last, min(max(TOKENS, *windows, 0), self._context))
        # int8 is compared with itself, int4 too: its distance from float32 is quality, not parity.
        self._own = OwnReference(bundle)
        self._precision = bundle.manifest.precision
        self._exact = self._precision == "fp32"
        self._source = ModuleReference(module) if module is not None and self._exact else None
        self._reference: Reference = self._source or self._own
        self._expected = self._reference.logits(self._ids)  # (T, V)
        self._quality = self._measure_quality(module) if module is not None and not self._exact else {}
        # Measured on this very text when it was exported; manifest.quality is on another.
        recorded = bundle.manifest.parity.get(bundle.manifest.precision, {})
        self._recorded_kl: float | None = recorded.get("kl_divergence")
        measured = self._quality.get("kl_divergence", 0.0)
        cost = measured if self._recorded_kl is None else self._recorded_kl
        self._kl_limit = max(DECODE_KL_ALLOWANCE.get(self._precision, 0) * cost, 2 * KL_FLOOR)
        self._decode_noise = 0.0  # max |difference| of logits, decode against prefill

    def run(self) -> Verification:
        checks = [self._prefill(), self._decode()]
        checks += [self._chunked(size) for size in CHUNK_SIZES]
        checks += [self._batch(), self._greedy()]
        if self._quality:
            checks.append(self._against_float32())
        reference = "own uncached run" if self._reference is self._own else "source"
        return Verification(reference, len(self._ids), tuple(checks), self._quality)

    def _measure_quality(self, module: nn.Module | None) -> dict[str, float]:
        assert module is not None
        exact = ModuleReference(module).logits(self._ids)
        return {
            "kl_divergence": kl_divergence(exact, self._expected),
            "top1_agreement": top1_agreement(exact, self._expected),
        }

    # --- checks ---------------------------------------------------------------------------------------------------
    def _prefill(self) -> Check:
        """All tokens in one run, through both graphs."""
        self._common.reset()
        logits = self._common.forward(self._ids[None])[0]
        self._last.reset()
        last = self._last.forward(self._ids[None])[0, -1]
        return self._compare("prefill", self._expected, logits, last)

    def _decode(self) -> Check:
        """One token at a time from the first on."""
        self._common.reset()
        self._last.reset()
        steps = [(self._common.forward(token[None, None])[0], self._last.decode(int(token))) for token in self._ids]
        logits = np.concatenate([step for step, _ in steps])
        self._decode_noise = float(np.abs(logits - self._expected).max())
        return self._compare("decode", self._expected, logits, steps[-1][1], single=True)

    def _chunked(self, size: int) -> Check:
        """The prompt in chunks, through the common graph and as `generate` prefills."""
        self._common.reset()
        count = -(-len(self._ids) // size)
        chunks = np.array_split(self._ids, count)
        logits = np.concatenate([self._common.forward(chunk[None])[0] for chunk in chunks])
        self._last.reset()
        last = self._last.prefill(self._ids, chunk_size=size)
        return self._compare(f"chunks_of_{size}", self._expected, logits, last)

    def _batch(self) -> Check:
        """Rows of different lengths prefilled and decoded together against each alone."""
        steps = min(BATCH_STEPS, self._context - 1)
        longest = min(BATCH_LENGTH, self._context - steps)
        lengths = sorted({longest, -(-longest // 2), 1}, reverse=True) if self._padding else [longest] * 3
        texts = [np.roll(self._ids, -row)[: length + steps] for row, length in enumerate(lengths)]
        ids = np.zeros((len(lengths), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, length in enumerate(lengths):
            ids[row, :length], mask[row, :length] = texts[row][:length], 1
        self._common.reset()
        together = [self._common.forward(ids, mask)]
        together += [
            self._common.forward(np.array([[text[length + step]] for text, length in zip(texts, lengths, strict=True)]))
            for step in range(steps)
        ]
        found, expected = [], []
        for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            found.append(np.concatenate([together[0][row, :length], *(step[row] for step in together[1:])]))
            expected.append(self._alone(text, length))
        return self._compare("batch", np.concatenate(expected), np.concatenate(found), None, locate=False)

    def _alone(self, text: Ids, length: int) -> Logits:
        """One row by itself: the reference's uncached run, or the bundle's own prefill and decode."""
        if self._exact:
            return self._reference.logits(text)
        self._common.reset()
        runs = [self._common.forward(text[None, :length])[0]]
        runs += [self._common.forward(token[None, None])[0] for token in text[length:]]
        return np.concatenate(runs)

    def _greedy(self) -> Check:
        """The continuation that `generate` writes against the reference's uncached one."""
        prompt = self._ids[: max(1, min(16, self._context // 2))].tolist()
        generation = Generation(self._last, prompt, max_new_tokens=GREEDY_TOKENS)
        found = list(generation)
        allowed = MAX_RELATIVE_DIFFERENCE if self._exact else 2 * self._decode_noise
        # One uncached run over the whole continuation: up to the first difference it is the reference's own, too.
        logits = self._reference.logits(np.array([*prompt, *found[:-1]], np.int64))[len(prompt) - 1 :]
        for step, token in enumerate(found):
            best = int(logits[step].argmax())
            if best != token:
                gap = float(logits[step, best] - logits[step, token])
                scale = float(np.abs(logits[step]).max()) if self._exact else 1.0
                detail = f"token {step} of the greedy continuation is {token}; the uncached run has {best}"
                return Check("greedy", gap <= allowed * scale, "first_difference", step, None, detail)
        return Check("greedy", True, "first_difference", None, None)

    def _against_float32(self) -> Check:
        """int8 or int4 against the source in float32: that it is the same model at all."""
        value, limit = self._quality["kl_divergence"], MAX_KL[self._precision]
        if self._recorded_kl is not None:
            limit = min(limit, RECORDED_KL_ALLOWANCE * max(self._recorded_kl, KL_FLOOR))
        better = "int8" if self._precision == "int4" else "fp32"
        detail = (
            f"its predictions are {value:.2g} nats from the source's in float32 (limit {limit:.2g}): it is another "
            f"model's bundle, or {self._precision} does not suit this model (export with precision {better})"
        )
        return Check("float32", value <= limit, "mean_kl", value, limit, "" if value <= limit else detail)

    # --- judging --------------------------------------------------------------------------------------------------
    def _compare(
        self,
        name: str,
        expected: Logits,
        found: Logits,
        last: Logits | None,
        *,
        single: bool = False,
        locate: bool = True,
    ) -> Check:
        """`last` (V,) is what pastkey's own graph gave for the last position; `single`: tokens came one by one."""
        value = relative_difference(expected, found)
        if last is not None:
            value = max(value, relative_difference(expected[-1:], last[None]))
        measure, limit = "max_relative_difference", MAX_RELATIVE_DIFFERENCE
        # int8 activations amplify last bits, which come out differently by the number of tokens in a run.
        if not self._exact and (single or value > limit):
            measure, limit = "mean_kl", self._kl_limit
            value = kl_divergence(expected, found)
        if value > limit and measure == "max_relative_difference" and self._source is not None:
            limit = max(limit, ROUNDING_ALLOWANCE * self._source.rounding(self._ids))
        ok = value <= limit
        detail = "" if ok else self._explain(name, value, measure, limit, locate)
        return Check(name, ok, measure, value, limit, detail)

    def _explain(self, name: str, value: float, measure: str, limit: float, locate: bool) -> str:
        what = {
            "max_relative_difference": f"logits differ by {value:.1e} of the largest logit (limit {limit:.0e})",
            "mean_kl": f"predictions differ by {value:.1e} nats (limit {limit:.1e})",
        }[measure]
        where = f", first in {self._first_layer()}" if locate else ""
        return (
            f"in the check {name!r} {what}{where}. A module must take every position from position_ids and every "
            "length from tensor.shape; a length that was made a Python number is baked into the graph"
        )

    def _first_layer(self) -> str:
        """The first attention call whose cached keys or values differ from the uncached run's."""
        for index, (keys, values) in enumerate(self._reference.cache(self._ids)):
            found = _rows(self._common, index)
            if any(
                relative_difference(a, b) > 10 * MAX_RELATIVE_DIFFERENCE
                for a, b in zip((keys, values), found, strict=True)
            ):
                layer = self._layers[index] if self._layers else None
                return f"layer {index}" + (f" ({layer.module}, {layer.where})" if layer else "")
        return "what follows the last layer's keys and values"

"""Parity: compares the runtime's results from a bundle, step by step, with an uncached run.

The reference is the exported module, run without a cache in torch. For int8 and int4, or without a module, it is the
bundle's own uncached run. The checks run the code that ships: every figure comes from `pastkey.runtime`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

import numpy as np

from pastkey.contract.bundle import Bundle, Manifest
from pastkey.files.memory import give_back_memory
from pastkey.precisions import PRECISIONS
from pastkey.runtime import Engine
from pastkey.runtime.options import PlacementOptions

from ..compare import logits_difference
from ..progress import SILENT, Progress
from .metrics import Ids, Logits, cosine_distance, kl_divergence, top1_agreement
from .paths import (
    BATCH_LENGTH,
    BATCH_STEPS,
    BEYOND_WINDOW,
    MAX_WINDOW,
    TOKENS,
    LastLogits,
    Plan,
    VerificationProgress,
    at_ends,
    run_last_logits,
    run_parts,
)
from .predictors import BundlePredictor, ModulePredictor, Predictor
from .verification import Check as Check
from .verification import Verification as Verification

if TYPE_CHECKING:
    from torch import nn

    from ..graft.probe.observe import CacheLayer

# --- tolerances, in this one place ----------------------------------------------------------------------
# Tolerances that depend on the precision of the weights are in `pastkey/precisions.py`, relative to the largest logit.
# A deep module's float32 results may be further than that from its float64 results in torch. Then the limit is this
# many times the distance measured on the same text.
ROUNDING_ALLOWANCE = 3
# A difference of up to this many limits is told as one of rounding.
NEAR_ROUNDING = 3
# int8 and int4 may choose a different token than the uncached run within this many times the distance of their own
# paths.
TIE_ALLOWANCE = 2
KL_FLOOR = 1e-6  # nats, explained by rounding
# A quantized bundle's divergence from its source in float32 may later be this many times that measured at export.
RECORDED_KL_ALLOWANCE = 2
# Maximum 1 - cosine between the last hidden states of int8 or int4 and those of float32, and between those of chunks
# and of one run. States of other channels or another layer are 0.1 and more apart.
MAX_COSINE_DISTANCE = 0.05


@dataclass(frozen=True)
class Tolerances:
    """The limits on a bundle's distance from its reference, fixed before the checks.

    Two further allowances depend on the checks' results: a deep module's own rounding, which costs a copy in float64
    and is measured only if a check fails (`_Compared.rounding`), and the distance of decode from prefill, within which
    the greedy continuation may differ at a tie (`_greedy`).
    """

    relative: float
    decode_kl: float | None = None  # nats, between paths of int8 or int4; None for float32
    fp32_kl: float | None = None  # nats, of int8 or int4 from the source in float32; None for float32

    @classmethod
    def of(cls, manifest: Manifest, measured_kl: float | None) -> Tolerances:
        """Returns a bundle's limits; `measured_kl` from float32 in nats, if the source is available."""
        precision = PRECISIONS[manifest.precision]
        if not precision.quantized:
            return cls(precision.max_difference)
        # Measured on this text at export; manifest.quality is on another.
        recorded: float | None = manifest.parity.get(precision.name, {}).get("kl_divergence")
        cost = recorded if recorded is not None else measured_kl or 0.0
        fp32_kl = precision.max_kl
        if recorded is not None:
            fp32_kl = min(fp32_kl, RECORDED_KL_ALLOWANCE * max(recorded, KL_FLOOR))
        return cls(precision.max_difference, max(precision.decode_kl * cost, 2 * KL_FLOOR), fp32_kl)


# --- verifying ----------------------------------------------------------------------------------------------------
def verify(
    bundle: Bundle,
    module: nn.Module | None = None,
    *,
    layers: tuple[CacheLayer, ...] = (),
    short: Ids | None = None,
    progress: Progress = SILENT,
    **placement: Unpack[PlacementOptions],
) -> Verification:
    """Runs every check of a bundle.

    Args:
        bundle: The bundle to verify.
        module: The module that it was exported from. float32 is compared with it; int8 and int4 are measured against
            it. Without a module, the bundle is compared with its own uncached run.
        layers: The attention calls: the text is longer than their windows up to MAX_WINDOW.
        short: A text (T,) of `short_texts`, for a quick proof: most of it is not decoded one by one.
        progress: Receives the progress of the verification.
        **placement: Where it runs, as for `load`.

    Returns:
        All checks, including those that failed: `require_ok` raises for them.

    Raises:
        InputError: The module fails on the text.
        NumericsError: Logits are not finite.
        ProviderError: A provider is unavailable, did not start, is not given this graph, or does not run all of it.
        RunError: onnxruntime cannot run a graph.
    """
    manifest = bundle.manifest
    quantized = PRECISIONS[manifest.precision].quantized
    source = None if module is None else ModulePredictor(module)
    windows = [layer.window + BEYOND_WINDOW for layer in layers if layer.window and layer.window <= MAX_WINDOW]
    length = min(max(TOKENS, *windows, 0), manifest.context_length) if short is None else short.size
    plan = Plan.of(length) if short is None else Plan.short(length)
    parts = VerificationProgress(progress, plan)
    # One graph is open at a time, since each session may hold all weights.
    last = run_last_logits(bundle, plan, short, source, parts, placement)
    give_back_memory()
    own = BundlePredictor(bundle, **placement)

    # int8 and int4 are compared with themselves: their distance from float32 is quality, not parity.
    reference = own if source is None or quantized else source
    expected = reference.logits(last.ids)
    quality = {}
    if source is not None and manifest.precision != "fp32":
        quality = _quality(source.logits(last.ids), expected if quantized else own.logits(last.ids))
    limits = Tolerances.of(manifest, quality.get("kl_divergence"))
    parts.next()
    compared = _Compared(manifest, plan, own.engine, last, reference, expected, limits, source)
    checks = []
    for check in _checks(compared, parts):
        checks.append(check)
        parts.next()
    if quality and quantized:
        checks.append(_against_float32(manifest.precision, quality["kl_divergence"], limits))
    parts.end()
    return Verification("source" if reference is source else "own uncached run", length, tuple(checks), quality)


def _quality(fp32: Logits, quantized: Logits) -> dict[str, float]:
    return {
        "kl_divergence": kl_divergence(fp32, quantized),
        "top1_agreement": top1_agreement(fp32, quantized),
    }


# --- checks -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Compared:
    """The runs of a bundle and its reference, on one text."""

    manifest: Manifest
    plan: Plan
    all_logits: Engine
    last: LastLogits
    reference: Predictor
    expected: Logits  # (T, V), the reference's
    limits: Tolerances
    source: ModulePredictor | None

    @functools.cached_property
    def rounding(self) -> float:
        """The limit that a module's own rounding allows, 0 for int8 and int4. Costs a copy in float64."""
        reference = self.reference
        return ROUNDING_ALLOWANCE * reference.rounding(self.last.ids) if isinstance(reference, ModulePredictor) else 0.0


def _checks(c: _Compared, progress: Progress) -> Iterator[Check]:
    noise = 0.0  # max |difference| of the logits of single tokens
    for name, sizes in c.plan.paths.items():
        by_all_logits = c.plan.decoded_by_all_logits if name == "decode" else sizes
        found = run_parts(c.all_logits.all_logits, c.all_logits, c.last.ids, by_all_logits, progress)
        pairs = [(c.expected, found), (c.expected[np.cumsum(sizes) - 1], c.last.paths[name])]
        # The run between the ends is as exact as a prefill, and would hide the error of the others in a mean.
        rows = (np.repeat(at_ends(by_all_logits), by_all_logits), at_ends(sizes))
        ends = [(expected[kept], logits[kept]) for (expected, logits), kept in zip(pairs, rows, strict=True)]
        if name == "decode":
            noise = max(float(np.abs(logits - expected).max()) for expected, logits in ends)
        yield _compare(c, name, pairs, ends, single=name == "decode")
    if c.manifest.graph != "static":  # it has one row
        yield _batch(c)
    yield _greedy(c, noise)
    if c.manifest.hidden_size is not None:
        yield from _hidden_states(c)


def _batch(c: _Compared) -> Check:
    """Compares rows of different lengths, prefilled and decoded together, with each row by itself."""
    context = c.manifest.context_length
    steps = min(BATCH_STEPS, context - 1)
    longest = min(BATCH_LENGTH, context - steps)
    lengths = (
        sorted({longest, -(-longest // 2), 1}, reverse=True) if c.all_logits.graph.takes_padding else [longest] * 3
    )
    texts = [np.roll(c.last.ids, -row)[: length + steps] for row, length in enumerate(lengths)]
    ids = np.zeros((len(lengths), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length], mask[row, :length] = texts[row][:length], 1
    c.all_logits.reset()
    together = [c.all_logits.forward(ids, mask)]
    together += [
        c.all_logits.forward(np.array([[text[length + step]] for text, length in zip(texts, lengths, strict=True)]))
        for step in range(steps)
    ]
    found, expected = [], []
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        found.append(np.concatenate([together[0][row, :length], *(step[row] for step in together[1:])]))
        expected.append(_alone(c, text, length))
    pairs = [(np.concatenate(expected), np.concatenate(found))]
    return _compare(c, "batch", pairs, pairs)


def _alone(c: _Compared, text: Ids, length: int) -> Logits:
    """Returns one row's logits: of the reference's uncached run, or for int8 and int4 of prefill and decode."""
    if c.limits.decode_kl is None:
        return c.reference.logits(text)
    c.all_logits.reset()
    runs = [c.all_logits.forward(text[None, :length])[0]]
    runs += [c.all_logits.forward(token[None, None])[0] for token in text[length:]]
    return np.concatenate(runs)


def _greedy(c: _Compared, noise: float) -> Check:
    """Compares the runtime's greedy continuation with the reference's uncached one.

    `noise` is max |difference| of logits, decode against prefill: int8 and int4 may differ at a tie within a multiple
    of it.
    """
    prompt, found = c.last.prompt.tolist(), c.last.greedy
    # One uncached run over the whole continuation suffices: up to the first difference, it is the reference's own.
    logits = c.reference.logits(np.array([*prompt, *found[:-1]], np.int64))[len(prompt) - 1 :]
    for step, token in enumerate(found):
        best = int(logits[step].argmax())
        if best != token:
            gap = float(logits[step, best] - logits[step, token])
            allowed = c.limits.relative * float(np.abs(logits[step]).max())
            if c.limits.decode_kl is not None:
                # Rounding differs from text to text: this continuation may be further from its decode.
                text = np.array([*prompt, *found[:-1]], np.int64)
                decoded = run_parts(c.all_logits.all_logits, c.all_logits, text, [1] * text.size, SILENT)
                decoded = decoded[len(prompt) - 1 :]
                if kl_divergence(logits, decoded) <= c.limits.decode_kl:
                    noise = max(noise, float(np.abs(decoded - logits).max()))
                allowed = TIE_ALLOWANCE * noise
            detail = f"token {step} of the greedy continuation is {token}; the uncached run has {best}"
            return Check("greedy", gap <= allowed, "first_difference", step, None, detail)
    return Check("greedy", True, "first_difference", None, None)


def _hidden_states(c: _Compared) -> Iterator[Check]:
    """Compares the last hidden states of every path with the source's; for int8 and int4, with those of one run."""
    quantized, pairs = c.limits.decode_kl is not None, c.last.hidden
    if quantized:
        yield _hidden_check("hidden_states", max(cosine_distance(*pair) for pair in pairs), MAX_COSINE_DISTANCE)
        if c.source is not None:
            value = cosine_distance(c.source.hidden_states(c.last.ids), pairs[0][1])
            yield _hidden_check("hidden_states_float32", value, MAX_COSINE_DISTANCE)
        return
    value, limit = max(logits_difference(*pair) for pair in pairs), c.limits.relative
    if value > limit and c.source is not None:
        limit = max(limit, ROUNDING_ALLOWANCE * c.source.rounding(c.last.ids, hidden=True))
    yield _hidden_check("hidden_states", value, limit, "max_relative_difference")


def _hidden_check(name: str, value: float, limit: float, measure: str = "mean_cosine_distance") -> Check:
    detail = f"in the check {name!r} the last hidden states differ by {value:.1e} ({measure}, limit {limit:.1e})"
    return Check(name, value <= limit, measure, value, limit, "" if value <= limit else detail)


def _against_float32(precision: str, kl: float, limits: Tolerances) -> Check:
    """Checks int8 or int4 against the source in float32: whether it is the same model."""
    assert limits.fp32_kl is not None
    detail = (
        f"its predictions are {kl:.2g} nats from the source's in float32 (limit {limits.fp32_kl:.2g}): it is another "
        f"model's bundle, or {precision} does not suit this model (export with precision {PRECISIONS[precision].finer})"
    )
    ok = kl <= limits.fp32_kl
    return Check("float32", ok, "mean_kl", kl, limits.fp32_kl, "" if ok else detail)


# --- judging ------------------------------------------------------------------------------------------------------
def _compare(
    c: _Compared,
    name: str,
    pairs: Sequence[tuple[Logits, Logits]],
    ends: Sequence[tuple[Logits, Logits]],
    *,
    single: bool = False,
) -> Check:
    """Compares `pairs` (N, V) of expected logits and found ones by each graph; `ends` are those that a mean is of.

    `single`: tokens were decoded one by one.
    """
    value = max(logits_difference(*pair) for pair in pairs)
    measure, limit = "max_relative_difference", c.limits.relative
    # int8 activations amplify last bits, which depend on the number of tokens in a run.
    if c.limits.decode_kl is not None and (single or value > limit):
        measure, limit = "mean_kl", c.limits.decode_kl
        value = max(kl_divergence(*pair) for pair in ends)
    if value > limit:
        limit = max(limit, c.rounding)
    ok = value <= limit
    return Check(name, ok, measure, value, limit, "" if ok else _explained(c, name, value, measure, limit))


def _explained(c: _Compared, name: str, value: float, measure: str, limit: float) -> str:
    what = {
        "max_relative_difference": f"logits differ by {value:.1e} of the largest logit (limit {limit:.1e})",
        "mean_kl": f"predictions differ by {value:.1e} nats (limit {limit:.1e})",
    }[measure]
    if measure == "max_relative_difference" and value <= NEAR_ROUNDING * limit and c.rounding:
        return (
            f"in the check {name!r} {what}. That is near rounding: float32 itself is off by "
            f"{c.rounding / ROUNDING_ALLOWANCE:.1e} there in torch, and a wrong position or length gives far more. "
            "--graph standard sums in another order"
        )
    return (
        f"in the check {name!r} {what}. Usual causes: numbers that pass between tokens outside attention, such "
        "as a mean over the tokens; a position that does not come from position_ids; a length that was made a Python "
        "number, which is baked into the graph"
    )

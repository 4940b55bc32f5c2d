"""Parity: compares the runtime's results from a bundle, step by step, with an uncached run.

The reference is the exported module, run without a cache in torch. For int8 and int4, or without a module, it is the
bundle's own uncached run. The checks run the code that ships: every figure comes from `pastkey.runtime`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

import numpy as np

from pastkey.contract.bundle import Bundle, Manifest
from pastkey.precisions import PRECISIONS
from pastkey.runtime import Engine, Generation, Request
from pastkey.runtime.engine.golden import require_golden
from pastkey.runtime.settings import PlacementOptions

from ..progress import SILENT, Progress
from .hidden_states import by_every_path, one_run
from .metrics import HiddenStates, Ids, Logits, cosine_distance, kl_divergence, relative_difference, top1_agreement
from .predictors import BundlePredictor, ModulePredictor, Predictor, cached_layers
from .texts import self_generated_texts
from .verification import Check as Check
from .verification import Verification as Verification

if TYPE_CHECKING:
    from torch import nn

    from ..graft.probe.observe import Layer

# --- tolerances and sizes, in this one place ----------------------------------------------------------------------
# Tolerances that depend on the precision of the weights are in `pastkey/precisions.py`, relative to the largest logit.
# A deep module's float32 results may be further than that from its float64 results in torch. Then the limit is this
# many times the distance measured on the same text.
ROUNDING_ALLOWANCE = 3
# The first layer whose keys or values exceed this many limits is reported.
LAYER_ALLOWANCE = 10
# int8 and int4 may choose a different token than the uncached run within this many times the distance of their own
# paths.
TIE_ALLOWANCE = 2
KL_FLOOR = 1e-6  # nats, explained by rounding
# A quantized bundle's divergence from its source in float32 may later be this many times that measured at export.
RECORDED_KL_ALLOWANCE = 2
# Maximum 1 - cosine between the last hidden states of int8 or int4 and those of float32, and between those of chunks
# and of one run. States of other channels or another layer are 0.1 and more apart.
MAX_COSINE_DISTANCE = 0.05
TOKENS = 150  # length of the compared text, if the context has room for it
MAX_WINDOW, BEYOND_WINDOW = 1024, 16  # or this many tokens beyond a window, if the window is at most MAX_WINDOW
RANDOM_TOKENS = 16  # at the beginning of the text; the model generates the rest
CHUNK_SIZES = (7, 64)  # the check "decode" uses chunks of one token
GREEDY_TOKENS = 64
# Of a quick export: the tokens that run at once, and those that are decoded after them, or in the greedy continuation.
SHORT_PREFILL, SHORT_DECODE = 64, 8
BATCH_LENGTH = 40  # the longest row of the batch
BATCH_STEPS = 4  # tokens decoded after it


@dataclass(frozen=True)
class Limits:
    """The limits on a bundle's distance from its reference, fixed before the checks.

    Two further allowances depend on the checks' results: a deep module's own rounding, which costs a copy in float64
    and is measured only if a check fails (`_Compared.rounding`), and the distance of decode from prefill, within which
    the greedy continuation may differ at a tie (`_greedy`).
    """

    relative: float
    decode_kl: float | None = None  # nats, between paths of int8 or int4; None for float32
    fp32_kl: float | None = None  # nats, of int8 or int4 from the source in float32; None for float32

    @classmethod
    def of(cls, manifest: Manifest, measured_kl: float | None) -> Limits:
        """Returns a bundle's limits; `measured_kl` from float32 in nats, if the source is available."""
        precision = PRECISIONS[manifest.precision]
        if not precision.quantized:
            return cls(precision.max_difference)
        # Measured on this text at export; manifest.quality is on another.
        recorded: float | None = manifest.parity.get(precision.name, {}).get("kl_divergence")
        cost = recorded if recorded is not None else measured_kl or 0.0
        fp32_kl = precision.max_kl
        if recorded is not None and not manifest.quick:  # a short text says less of other texts
            fp32_kl = min(fp32_kl, RECORDED_KL_ALLOWANCE * max(recorded, KL_FLOOR))
        return cls(precision.max_difference, max(precision.decode_kl * cost, 2 * KL_FLOOR), fp32_kl)


# --- verifying ----------------------------------------------------------------------------------------------------
def verify(
    bundle: Bundle,
    module: nn.Module | None = None,
    *,
    layers: tuple[Layer, ...] = (),
    short: Ids | None = None,
    progress: Progress = SILENT,
    **placement: Unpack[PlacementOptions],
) -> Verification:
    """Runs every check of a bundle.

    Args:
        bundle: The bundle to verify.
        module: The module that it was exported from. float32 is compared with it; int8 and int4 are measured against
            it. Without a module, the bundle is compared with its own uncached run.
        layers: The attention calls as messages name them. The text is longer than windows up to MAX_WINDOW.
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
    hidden = manifest.hidden_size is not None
    parts = _Parts(progress, _PARTS - (manifest.graph == "static") + hidden)
    own, last_logits = BundlePredictor(bundle, **placement), Engine(bundle, graph="last_logits", **placement)
    require_golden(last_logits, bundle)
    windows = [layer.window + BEYOND_WINDOW for layer in layers if layer.window and layer.window <= MAX_WINDOW]
    ids = short
    if ids is None:
        ids = _text(last_logits, min(max(TOKENS, *windows, 0), manifest.context_length), parts)
    parts.next()

    # int8 and int4 are compared with themselves: their distance from float32 is quality, not parity.
    source = None if module is None else ModulePredictor(module)
    reference = own if source is None or quantized else source
    expected = reference.logits(ids)
    quality = {}
    if source is not None and manifest.precision != "fp32":
        quality = _quality(source.logits(ids), expected if quantized else own.logits(ids))
    limits = Limits.of(manifest, quality.get("kl_divergence"))
    all_logits = Engine(bundle, graph="all_logits", **placement)
    require_golden(all_logits, bundle)
    at_once = 0 if short is None else min(SHORT_PREFILL, len(ids) - 1)
    greedy = GREEDY_TOKENS if short is None else SHORT_DECODE
    compared = _Compared(
        manifest, all_logits, last_logits, reference, ids, expected, limits, layers, source, at_once, greedy
    )
    parts.next()

    checks = []
    for check in _checks(compared, parts):
        checks.append(check)
        if check.name != "hidden_states_float32":
            parts.next()
    if quality and quantized:
        checks.append(_against_float32(manifest.precision, quality["kl_divergence"], limits))
    return Verification("source" if reference is source else "own uncached run", len(ids), tuple(checks), quality)


_PARTS = 2 + 4 + len(CHUNK_SIZES)  # the text, the reference, and the checks


class _Parts(Progress):
    """The parts of a verification, each with its own progress."""

    def __init__(self, progress: Progress, count: int) -> None:
        self._progress, self._count, self._done = progress, count, 0

    def advance(self, done: int, total: int) -> None:
        self._progress.advance(100 * self._done + 100 * done // total, 100 * self._count)

    def next(self) -> None:
        """Begins the next part."""
        self._done += 1
        self.advance(0, 1)


def _text(engine: Engine, length: int, progress: Progress = SILENT) -> Ids:
    """Returns a text (T,): some random ids, and the bundle's continuation.

    A model may repeat one token for ever. Attention over equal tokens has the same result whatever its weights.
    """
    return _texts(engine, length, 1, progress)[0]


def short_texts(engine: Engine, count: int, progress: Progress = SILENT) -> list[Ids]:
    """Returns `count` texts for the proof of a quick export."""
    return _texts(engine, min(SHORT_PREFILL + SHORT_DECODE, engine.manifest.context_length), count, progress)


def _texts(engine: Engine, length: int, count: int, progress: Progress) -> list[Ids]:
    beginning = min(RANDOM_TOKENS, -(-length // 2))
    ids: list[int] = np.random.default_rng(0).integers(0, engine.manifest.vocab_size, beginning).tolist()
    return self_generated_texts(engine, ids, count, length, progress)


def _quality(fp32: Logits, quantized: Logits) -> dict[str, float]:
    return {
        "kl_divergence": kl_divergence(fp32, quantized),
        "top1_agreement": top1_agreement(fp32, quantized),
    }


# --- checks -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Compared:
    """The graphs of a bundle and its reference, on one text."""

    manifest: Manifest
    all_logits: Engine
    last_logits: Engine
    reference: Predictor
    ids: Ids  # (T,)
    expected: Logits  # (T, V), the reference's
    limits: Limits
    layers: tuple[Layer, ...]
    source: ModulePredictor | None
    at_once: int  # tokens that run at once before the others are decoded
    greedy: int  # tokens of the greedy continuation

    @functools.cached_property
    def rounding(self) -> float:
        """The limit that a module's own rounding allows, 0 for int8 and int4. Costs a copy in float64."""
        reference = self.reference
        return ROUNDING_ALLOWANCE * reference.rounding(self.ids) if isinstance(reference, ModulePredictor) else 0.0


def _checks(c: _Compared, progress: Progress) -> Iterator[Check]:
    yield _prefill(c)
    decoded, last = _decoded(c, progress)
    noise = float(np.abs(decoded - c.expected).max())
    yield _compare(c, "decode", c.expected, decoded, last, single=True)
    for size in CHUNK_SIZES:
        yield _chunked(c, size)
    if c.manifest.graph != "static":  # it has one row
        yield _batch(c)
    yield _greedy(c, noise)
    if c.manifest.hidden_size is not None:
        yield from _hidden_states(c)


def _prefill(c: _Compared) -> Check:
    """Runs all tokens at once, through both graphs."""
    c.all_logits.reset()
    logits = c.all_logits.forward(c.ids[None])[0]
    c.last_logits.reset()
    last = c.last_logits.forward(c.ids[None])[0, -1]
    return _compare(c, "prefill", c.expected, logits, last)


def _decoded(c: _Compared, progress: Progress) -> tuple[Logits, Logits]:
    """Decodes token by token: logits (T, V), and (V,) of the last by the last-logits graph."""
    logits = _by_token(c.all_logits, c.ids, c.at_once)
    c.last_logits.reset()
    if c.at_once:
        c.last_logits.prefill(c.ids[: c.at_once])
    for number, token in enumerate(c.ids[c.at_once :], 1 + c.at_once):
        last = c.last_logits.decode(int(token))
        progress.advance(number, len(c.ids))
    return logits, last


def _by_token(engine: Engine, ids: Ids, at_once: int = 0) -> Logits:
    """Decodes ids (T,) token by token, after the first `at_once`: logits (T, V)."""
    engine.reset()
    first = [engine.forward(ids[None, :at_once])[0]] if at_once else []
    return np.concatenate([*first, *(engine.forward(token[None, None])[0] for token in ids[at_once:])])


def _chunked(c: _Compared, size: int) -> Check:
    """Runs the prompt in chunks, through the all-logits graph and with `Engine.prefill`."""
    c.all_logits.reset()
    chunks = np.array_split(c.ids, -(-len(c.ids) // size))
    logits = np.concatenate([c.all_logits.forward(chunk[None])[0] for chunk in chunks])
    c.last_logits.reset()
    last = c.last_logits.prefill(c.ids, chunk_size=size)
    return _compare(c, f"chunks_of_{size}", c.expected, logits, last)


def _batch(c: _Compared) -> Check:
    """Compares rows of different lengths, prefilled and decoded together, with each row alone."""
    context = c.manifest.context_length
    steps = min(BATCH_STEPS, context - 1)
    longest = min(BATCH_LENGTH, context - steps)
    lengths = (
        sorted({longest, -(-longest // 2), 1}, reverse=True) if c.all_logits.graph.takes_padding else [longest] * 3
    )
    texts = [np.roll(c.ids, -row)[: length + steps] for row, length in enumerate(lengths)]
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
    return _compare(c, "batch", np.concatenate(expected), np.concatenate(found), None, locate=False)


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
    prompt = c.ids[: max(1, min(16, c.manifest.context_length // 2))].tolist()
    found = list(Generation(c.last_logits, Request(prompt, max_new_tokens=c.greedy)))
    # One uncached run over the whole continuation suffices: up to the first difference, it is the reference's own.
    logits = c.reference.logits(np.array([*prompt, *found[:-1]], np.int64))[len(prompt) - 1 :]
    for step, token in enumerate(found):
        best = int(logits[step].argmax())
        if best != token:
            gap = float(logits[step, best] - logits[step, token])
            allowed = c.limits.relative * float(np.abs(logits[step]).max())
            if c.limits.decode_kl is not None:
                # Rounding differs from text to text: this continuation may be further from its decode.
                decoded = _by_token(c.all_logits, np.array([*prompt, *found[:-1]], np.int64))[len(prompt) - 1 :]
                if kl_divergence(logits, decoded) <= c.limits.decode_kl:
                    noise = max(noise, float(np.abs(decoded - logits).max()))
                allowed = TIE_ALLOWANCE * noise
            detail = f"token {step} of the greedy continuation is {token}; the uncached run has {best}"
            return Check("greedy", gap <= allowed, "first_difference", step, None, detail)
    return Check("greedy", True, "first_difference", None, None)


def _hidden_states(c: _Compared) -> Iterator[Check]:
    """Compares one run, chunks and a batch with the source; for int8 and int4, with one run."""
    quantized = c.limits.decode_kl is not None

    def alone(ids: Ids) -> HiddenStates:
        return one_run(c.last_logits, ids) if quantized or c.source is None else c.source.hidden_states(ids)

    longest = min(BATCH_LENGTH, c.ids.size)
    pairs = [*by_every_path(c.last_logits, c.ids, [longest, -(-longest // 2), 1], alone)]
    if quantized:
        yield _hidden_check("hidden_states", max(cosine_distance(*pair) for pair in pairs), MAX_COSINE_DISTANCE)
        if c.source is not None:
            value = cosine_distance(c.source.hidden_states(c.ids), pairs[0][1])
            yield _hidden_check("hidden_states_float32", value, MAX_COSINE_DISTANCE)
        return
    value, limit = max(relative_difference(*pair) for pair in pairs), c.limits.relative
    if value > limit and c.source is not None:
        limit = max(limit, ROUNDING_ALLOWANCE * c.source.rounding(c.ids, hidden=True))
    yield _hidden_check("hidden_states", value, limit, "max_relative_difference")


def _hidden_check(name: str, value: float, limit: float, measure: str = "mean_cosine_distance") -> Check:
    detail = f"in the check {name!r} the last hidden states differ by {value:.1e} ({measure}, limit {limit:.1e})"
    return Check(name, value <= limit, measure, value, limit, "" if value <= limit else detail)


def _against_float32(precision: str, kl: float, limits: Limits) -> Check:
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
    expected: Logits,
    found: Logits,
    last: Logits | None,
    *,
    single: bool = False,
    locate: bool = True,
) -> Check:
    """`last` (V,): logits of the last position by the last-logits graph; `single`: tokens were decoded one by one."""
    value = relative_difference(expected, found)
    if last is not None:
        value = max(value, relative_difference(expected[-1:], last[None]))
    measure, limit = "max_relative_difference", c.limits.relative
    # int8 activations amplify last bits, which depend on the number of tokens in a run.
    if c.limits.decode_kl is not None and (single or value > limit):
        measure, limit = "mean_kl", c.limits.decode_kl
        value = kl_divergence(expected, found)
    if value > limit:
        limit = max(limit, c.rounding)
    ok = value <= limit
    return Check(name, ok, measure, value, limit, "" if ok else _explained(c, name, value, measure, limit, locate))


def _explained(c: _Compared, name: str, value: float, measure: str, limit: float, locate: bool) -> str:
    what = {
        "max_relative_difference": f"logits differ by {value:.1e} of the largest logit (limit {limit:.0e})",
        "mean_kl": f"predictions differ by {value:.1e} nats (limit {limit:.1e})",
    }[measure]
    where = f", first in {_first_layer(c)}" if locate else ""
    return (
        f"in the check {name!r} {what}{where}. A module must take every position from position_ids and every "
        "length from tensor.shape; a length that was made a Python number is baked into the graph"
    )


def _first_layer(c: _Compared) -> str:
    """Returns the first attention call whose keys or values, cached by the check, differ from the uncached run's."""
    cached = cached_layers(c.all_logits)
    for index, (expected, found) in enumerate(zip(c.reference.cache(c.ids), cached, strict=True)):
        if any(
            relative_difference(a, b) > LAYER_ALLOWANCE * c.limits.relative
            for a, b in zip(expected, found, strict=True)
        ):
            layer = c.layers[index] if c.layers else None
            return f"layer {index}" + (f" ({layer.module}, {layer.where})" if layer else "")
    return "what follows the last layer's keys and values"

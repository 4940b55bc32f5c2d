"""Parity: compares the runtime's results from a bundle, step by step, with an uncached run.

The reference is the exported module, run without a cache in torch. For int8 and int4, or without a module, it is the
bundle's own uncached run. The checks run the code that ships: every figure comes from `pastkey.runtime`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
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
RANDOM_TOKENS = 16  # at the beginning of the text; the model generates the rest, in pieces side by side
PIECE_TOKENS = 32
# Each run reads all weights, so a text is run in parts of these sizes only at its beginning and at its end, and the
# tokens between them in one run. `docs/verification.md` has the faults that are found so.
DECODED, DECODED_BY_ALL_LOGITS = (24, 24), (8, 8)  # single tokens at both ends, by the last- and all-logits graph
CHUNKS = {7: (4, 4), 64: (1, 1)}  # size of a chunk -> chunks at both ends
GREEDY_TOKENS = 32
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
        if recorded is not None:
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
    source = None if module is None else ModulePredictor(module)
    windows = [layer.window + BEYOND_WINDOW for layer in layers if layer.window and layer.window <= MAX_WINDOW]
    length = min(max(TOKENS, *windows, 0), manifest.context_length) if short is None else short.size
    plan = _Plan.of(length) if short is None else _Plan.short(length)
    parts = _Parts(progress, plan)
    # One graph is open at a time, since each session may hold all weights.
    last = _run_last_logits(bundle, plan, short, source, parts, placement)
    own = BundlePredictor(bundle, **placement)

    # int8 and int4 are compared with themselves: their distance from float32 is quality, not parity.
    reference = own if source is None or quantized else source
    expected = reference.logits(last.ids)
    quality = {}
    if source is not None and manifest.precision != "fp32":
        quality = _quality(source.logits(last.ids), expected if quantized else own.logits(last.ids))
    limits = Limits.of(manifest, quality.get("kl_divergence"))
    parts.next()
    compared = _Compared(manifest, plan, own.engine, last, reference, expected, limits, layers, source)
    checks = []
    for check in _checks(compared, parts):
        checks.append(check)
        parts.next()
    if quality and quantized:
        checks.append(_against_float32(manifest.precision, quality["kl_divergence"], limits))
    parts.end()
    return Verification("source" if reference is source else "own uncached run", length, tuple(checks), quality)


class _Parts(Progress):
    """The parts of a verification, each with its own progress and as long as it has runs."""

    def __init__(self, progress: Progress, plan: _Plan) -> None:
        paths = [*map(len, plan.paths.values())]
        self._progress, self._done = progress, 0
        self._runs = [PIECE_TOKENS, *paths, plan.greedy, 4]  # the text, its paths and hidden states
        self._runs += [4, *paths, 2 * BATCH_STEPS, 1, 4]  # the reference, and the checks
        self._total = sum(self._runs)

    def advance(self, done: int, total: int) -> None:
        runs = self._runs[0] if self._runs else 0
        self._progress.advance(100 * self._done + 100 * runs * done // total, 100 * self._total)

    def next(self) -> None:
        """Begins the next part."""
        if self._runs:
            self._done += self._runs.pop(0)
        self.advance(0, 1)

    def end(self) -> None:
        """All parts are complete."""
        self._done, self._runs = self._total, []
        self.advance(0, 1)


def _quality(fp32: Logits, quantized: Logits) -> dict[str, float]:
    return {
        "kl_divergence": kl_divergence(fp32, quantized),
        "top1_agreement": top1_agreement(fp32, quantized),
    }


# --- runs ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Plan:
    """How a text is run.

    Attributes:
        paths: The checks of one sequence: name -> the tokens of each run.
        decoded_by_all_logits: The tokens of each run of the check "decode" by the all-logits graph.
        greedy: Tokens of the greedy continuation.
    """

    paths: dict[str, list[int]]
    decoded_by_all_logits: list[int]
    greedy: int

    @classmethod
    def of(cls, length: int) -> _Plan:
        """For a text of `length` tokens."""
        decode = _sizes(length, 1, DECODED)
        return cls(_paths(length, decode), _sizes(length, 1, DECODED_BY_ALL_LOGITS), GREEDY_TOKENS)

    @classmethod
    def short(cls, length: int) -> _Plan:
        """For a quick proof on a text of `length` tokens."""
        at_once = min(SHORT_PREFILL, length - 1)
        decode = [at_once] * (at_once > 0) + [1] * (length - at_once)
        return cls(_paths(length, decode), decode, SHORT_DECODE)


def _paths(length: int, decode: list[int]) -> dict[str, list[int]]:
    chunks = {f"chunks_of_{size}": _sizes(length, size, ends) for size, ends in CHUNKS.items()}
    return {"prefill": [length], "decode": decode, **chunks}


def _sizes(length: int, size: int, ends: tuple[int, int]) -> list[int]:
    """The tokens of each run of a text: so many runs of `size` at its beginning and end, and one between them.

    A shorter text is run in parts of about `size`.
    """
    first, last = ends
    between = length - (first + last) * size
    if between <= size:
        return [part.size for part in np.array_split(np.empty(length), -(-length // size))]
    return [size] * first + [between] + [size] * last


@dataclass(frozen=True)
class _LastLogits:
    """What the last-logits graph computed. It is closed since."""

    ids: Ids  # (T,), the text
    paths: dict[str, Logits]  # check -> (N, V), after each run
    greedy: list[int]  # the runtime's continuation of `prompt`
    hidden: list[tuple[HiddenStates, HiddenStates]]  # expected and found, if the bundle has them

    @property
    def prompt(self) -> Ids:
        """The beginning of the text that is continued greedily."""
        return self.ids[: max(1, min(16, self.ids.size // 2))]


def _run_last_logits(
    bundle: Bundle,
    plan: _Plan,
    short: Ids | None,
    source: ModulePredictor | None,
    parts: _Parts,
    placement: PlacementOptions,
) -> _LastLogits:
    """Opens the last-logits graph, generates the text unless it is given, and runs it by each path."""
    engine = Engine(bundle, graph="last_logits", **placement)
    require_golden(engine, bundle)
    ids = _text(engine, sum(plan.paths["prefill"]), parts) if short is None else short
    found = _LastLogits(ids, {}, [], [])
    parts.next()
    for name, sizes in plan.paths.items():
        found.paths[name] = _run_parts(engine.prefill, engine, found.ids, sizes, parts)
        parts.next()
    for token in Generation(engine, Request(found.prompt.tolist(), max_new_tokens=plan.greedy)):
        found.greedy.append(token)
        parts.advance(len(found.greedy), plan.greedy)
    parts.next()
    if bundle.manifest.hidden_size is not None:
        found.hidden.extend(_hidden(engine, found.ids, source))
    parts.next()
    return found


def _text(engine: Engine, length: int, progress: Progress = SILENT) -> Ids:
    """Returns a text (T,): some random ids, and continuations of them by the bundle, one after another.

    A model may repeat one token for ever. Attention over equal tokens has the same result whatever its weights.
    """
    beginning = min(RANDOM_TOKENS, -(-length // 2))
    pieces = 1 if engine.manifest.static is not None else -(-(length - beginning) // PIECE_TOKENS) or 1
    rows = _continued(engine, beginning, beginning + -(-(length - beginning) // pieces), pieces, progress)
    return np.concatenate([rows[0][:beginning], *(row[beginning:] for row in rows)])[:length]


def short_texts(engine: Engine, count: int, progress: Progress = SILENT) -> list[Ids]:
    """Returns `count` texts for the proof of a quick export."""
    length = min(SHORT_PREFILL + SHORT_DECODE, engine.manifest.context_length)
    return _continued(engine, min(RANDOM_TOKENS, -(-length // 2)), length, count, progress)


def _continued(engine: Engine, beginning: int, length: int, count: int, progress: Progress) -> list[Ids]:
    """Returns `count` continuations, each (length,) with the same `beginning` of so many random ids."""
    ids: list[int] = np.random.default_rng(0).integers(0, engine.manifest.vocab_size, beginning).tolist()
    return self_generated_texts(engine, ids, count, length, progress)


def _run_parts(run: Callable[[Ids], Logits], engine: Engine, ids: Ids, sizes: list[int], progress: Progress) -> Logits:
    """Runs a text in parts of these sizes, from an empty cache. Returns all logits (N, V) that `run` returns."""
    engine.reset()
    logits = []
    for part in np.split(ids, np.cumsum(sizes)[:-1]):
        logits.append(np.atleast_2d(run(part)))
        progress.advance(len(logits), len(sizes))
    return np.concatenate(logits)


def _hidden(engine: Engine, ids: Ids, source: ModulePredictor | None) -> Iterator[tuple[HiddenStates, HiddenStates]]:
    """The last hidden states of one run, chunks and a batch: the source's, or for int8 and int4 those of one run."""

    def alone(ids: Ids) -> HiddenStates:
        quantized = PRECISIONS[engine.manifest.precision].quantized
        return one_run(engine, ids) if quantized or source is None else source.hidden_states(ids)

    longest = min(BATCH_LENGTH, ids.size)
    return by_every_path(engine, ids, [longest, -(-longest // 2), 1], alone)


# --- checks -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Compared:
    """The runs of a bundle and its reference, on one text."""

    manifest: Manifest
    plan: _Plan
    all_logits: Engine
    last: _LastLogits
    reference: Predictor
    expected: Logits  # (T, V), the reference's
    limits: Limits
    layers: tuple[Layer, ...]
    source: ModulePredictor | None

    @functools.cached_property
    def rounding(self) -> float:
        """The limit that a module's own rounding allows, 0 for int8 and int4. Costs a copy in float64."""
        reference = self.reference
        return ROUNDING_ALLOWANCE * reference.rounding(self.last.ids) if isinstance(reference, ModulePredictor) else 0.0


def _checks(c: _Compared, progress: Progress) -> Iterator[Check]:
    for name, sizes in c.plan.paths.items():
        if name == "decode":
            check, noise = _decode(c, sizes, progress)
            yield check
        else:
            found = _run_parts(c.all_logits.all_logits, c.all_logits, c.last.ids, sizes, progress)
            yield _compare(c, name, c.expected, found, c.expected[np.cumsum(sizes) - 1], c.last.paths[name])
    if c.manifest.graph != "static":  # it has one row
        yield _batch(c)
    yield _greedy(c, noise)
    if c.manifest.hidden_size is not None:
        yield from _hidden_states(c)


def _decode(c: _Compared, sizes: list[int], progress: Progress) -> tuple[Check, float]:
    """Compares single tokens. Returns also max |difference| of their logits."""
    fewer = c.plan.decoded_by_all_logits
    logits = _run_parts(c.all_logits.all_logits, c.all_logits, c.last.ids, fewer, progress)
    singly, singly_by_last = np.repeat(fewer, fewer) == 1, np.array(sizes) == 1
    found, last = logits[singly], c.last.paths["decode"][singly_by_last]
    expected, expected_last = c.expected[singly], c.expected[np.cumsum(sizes) - 1][singly_by_last]
    noise = max(float(np.abs(found - expected).max()), float(np.abs(last - expected_last).max()))
    return _compare(c, "decode", expected, found, expected_last, last, single=True), noise


def _batch(c: _Compared) -> Check:
    """Compares rows of different lengths, prefilled and decoded together, with each row alone."""
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
    return _compare(c, "batch", np.concatenate(expected), np.concatenate(found), locate=False)


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
                decoded = _run_parts(c.all_logits.all_logits, c.all_logits, text, [1] * text.size, SILENT)
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
    value, limit = max(relative_difference(*pair) for pair in pairs), c.limits.relative
    if value > limit and c.source is not None:
        limit = max(limit, ROUNDING_ALLOWANCE * c.source.rounding(c.last.ids, hidden=True))
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
    expected_last: Logits | None = None,
    last: Logits | None = None,
    *,
    single: bool = False,
    locate: bool = True,
) -> Check:
    """`last` (N, V): logits by the last-logits graph; `single`: tokens were decoded one by one."""
    value = relative_difference(expected, found)
    if expected_last is not None and last is not None:
        value = max(value, relative_difference(expected_last, last))
    measure, limit = "max_relative_difference", c.limits.relative
    # int8 activations amplify last bits, which depend on the number of tokens in a run.
    if c.limits.decode_kl is not None and (single or value > limit):
        measure, limit = "mean_kl", c.limits.decode_kl
        value = kl_divergence(expected, found)
        if expected_last is not None and last is not None:
            value = max(value, kl_divergence(expected_last, last))
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
    for index, (expected, found) in enumerate(zip(c.reference.cache(c.last.ids), cached, strict=True)):
        if any(
            relative_difference(a, b) > LAYER_ALLOWANCE * c.limits.relative
            for a, b in zip(expected, found, strict=True)
        ):
            layer = c.layers[index] if c.layers else None
            return f"layer {index}" + (f" ({layer.module}, {layer.where})" if layer else "")
    return "what follows the last layer's keys and values"

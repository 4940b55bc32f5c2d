"""The compared text of a verification, and its runs by every path through the last-logits graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pastkey.contract.bundle import Bundle
from pastkey.precisions import PRECISIONS
from pastkey.runtime import Engine, Generation, Request
from pastkey.runtime.engine.golden import require_golden
from pastkey.runtime.options import PlacementOptions

from ..progress import SILENT, Progress
from .hidden_states import by_every_path, one_run
from .metrics import HiddenStates, Ids, Logits
from .predictors import ModulePredictor
from .texts import self_generated_texts

TOKENS = 150  # length of the compared text, if the context has room for it
MAX_WINDOW, BEYOND_WINDOW = 1024, 16  # or this many tokens beyond a window, if the window is at most MAX_WINDOW
RANDOM_TOKENS = 16  # at the beginning of the text; the model generates the rest, in pieces side by side
PIECE_TOKENS, SHORT_PIECE = 32, 16
# Each run reads all weights, so a text is run in parts of these sizes only at its beginning and at its end, and the
# tokens between them in one run. `docs/dev/verification.md` has the faults that are found so.
DECODED, DECODED_BY_ALL_LOGITS = 24, 8  # single tokens at each end, by the last- and the all-logits graph
CHUNKS = {7: 8, 64: 1}  # size of a chunk -> chunks at each end
GREEDY_TOKENS = 32
# Of a quick export: the tokens that run at once, and those that are decoded after them, or in the greedy continuation.
SHORT_PREFILL, SHORT_DECODE = 64, 8
BATCH_LENGTH = 40  # the longest row of the batch
BATCH_STEPS = 4  # tokens decoded after it


@dataclass(frozen=True)
class Plan:
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
    def of(cls, length: int) -> Plan:
        """For a text of `length` tokens."""
        decode = sizes_of_runs(length, 1, DECODED)
        return cls(_paths(length, decode), sizes_of_runs(length, 1, DECODED_BY_ALL_LOGITS), GREEDY_TOKENS)

    @classmethod
    def short(cls, length: int) -> Plan:
        """For a quick proof on a text of `length` tokens."""
        at_once = min(SHORT_PREFILL, length - 1)
        decode = [at_once] * (at_once > 0) + [1] * (length - at_once)
        return cls(_paths(length, decode), decode, SHORT_DECODE)


def _paths(length: int, decode: list[int]) -> dict[str, list[int]]:
    chunks = {f"chunks_of_{size}": sizes_of_runs(length, size, ends) for size, ends in CHUNKS.items()}
    return {"prefill": [length], "decode": decode, **chunks}


def sizes_of_runs(length: int, size: int, ends: int) -> list[int]:
    """The tokens of each run of a text: `ends` runs of `size` at its beginning and at its end, and one between them.

    A shorter text is run in parts of about `size`.
    """
    between = length - 2 * ends * size
    if between <= size:
        return [part.size for part in np.array_split(np.empty(length), -(-length // size))]
    return [size] * ends + [between] + [size] * ends


def at_ends(sizes: list[int]) -> npt.NDArray[np.bool_]:
    """Whether each run is at an end of the text, and not the longer one between."""
    return np.array(sizes) < 2 * min(sizes)


@dataclass(frozen=True)
class LastLogits:
    """The results of the last-logits graph, which is closed since."""

    ids: Ids  # (T,), the text
    paths: dict[str, Logits]  # check -> (N, V), after each run
    greedy: list[int]  # the runtime's continuation of `prompt`
    hidden: list[tuple[HiddenStates, HiddenStates]]  # expected and found, if the bundle has them

    @property
    def prompt(self) -> Ids:
        """The beginning of the text that is continued greedily."""
        return self.ids[: max(1, min(16, self.ids.size // 2))]


def run_last_logits(
    bundle: Bundle,
    plan: Plan,
    short: Ids | None,
    source: ModulePredictor | None,
    parts: VerificationProgress,
    placement: PlacementOptions,
) -> LastLogits:
    """Opens the last-logits graph, generates the text unless it is given, and runs it by each path."""
    engine = Engine(bundle, graph="last_logits", **placement)
    require_golden(engine, bundle)
    ids = compared_text(engine, sum(plan.paths["prefill"]), parts) if short is None else short
    found = LastLogits(ids, {}, [], [])
    parts.next()
    for name, sizes in plan.paths.items():
        found.paths[name] = run_parts(engine.prefill, engine, found.ids, sizes, parts)
        parts.next()
    for token in Generation(engine, Request(found.prompt.tolist(), max_new_tokens=plan.greedy)):
        found.greedy.append(token)
        parts.advance(len(found.greedy), plan.greedy)
    parts.next()
    if bundle.manifest.hidden_size is not None:
        found.hidden.extend(_hidden(engine, found.ids, source))
    parts.next()
    return found


def compared_text(engine: Engine, length: int, progress: Progress = SILENT) -> Ids:
    """Returns a text (T,): some random ids, and continuations of them by the bundle, one after another.

    A model may repeat one token for ever. Attention over equal tokens has the same result whatever its weights.
    """
    return _texts(engine, 1, length, PIECE_TOKENS, progress)[0]


def short_texts(engine: Engine, count: int, progress: Progress = SILENT) -> list[Ids]:
    """Returns `count` texts for the proof of a quick export."""
    length = min(SHORT_PREFILL + SHORT_DECODE, engine.manifest.context_length)
    return _texts(engine, count, length, SHORT_PIECE, progress)


def _texts(engine: Engine, count: int, length: int, piece: int, progress: Progress) -> list[Ids]:
    """Returns texts (length,) of pieces of about so many tokens, which are written side by side."""
    beginning = min(RANDOM_TOKENS, -(-length // 2))
    ids = np.random.default_rng(0).integers(0, engine.manifest.vocab_size, beginning)
    pieces = 1 if engine.manifest.static is not None else -(-(length - beginning) // piece) or 1
    end = beginning + -(-(length - beginning) // pieces)
    rows = self_generated_texts(engine, ids.tolist(), pieces * count, end, progress)
    parts = [[ids, *(row[beginning:] for row in rows[start::count])] for start in range(count)]
    return [np.concatenate(part)[:length] for part in parts]


def run_parts(run: Callable[[Ids], Logits], engine: Engine, ids: Ids, sizes: list[int], progress: Progress) -> Logits:
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


# --- progress -----------------------------------------------------------------------------------------------------
class VerificationProgress(Progress):
    """The parts of a verification, each with its own progress."""

    def __init__(self, progress: Progress, plan: Plan) -> None:
        self._progress, self._done = progress, 0
        # The text, its paths, greedy decoding and hidden states; the reference and the same again, with a batch.
        self._total = 7 + 2 * len(plan.paths)

    def advance(self, done: int, total: int) -> None:
        self._progress.advance(100 * self._done + 100 * done // total, 100 * self._total)

    def next(self) -> None:
        """Begins the next part."""
        self._done = min(self._done + 1, self._total)
        self.advance(0, 1)

    def end(self) -> None:
        """All parts are complete."""
        self._done = self._total
        self.advance(0, 1)

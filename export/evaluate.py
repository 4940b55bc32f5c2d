"""How well a model predicts a text, how far two models' predictions are apart, and a text to measure it on.

The figures are the field's own. `evaluate` takes a text window by window and never holds the logits of two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pastkey.bundle import Bundle
from pastkey.errors import InputError, MissingFileError, NumericsError
from pastkey.runtime import Generation, SamplingConfig, Session
from pastkey.runtime.text import TextCodec

from .settings import GREEDY_PROMPT_TOKENS, GREEDY_PROMPTS, GREEDY_TOKENS

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
LogProbabilities = npt.NDArray[np.float64]

_ROWS = 64  # positions whose probabilities are held in float64 at once: a vocabulary may be large


# --- figures ------------------------------------------------------------------------------------------------------
def log_softmax(logits: Logits) -> LogProbabilities:
    """log p over the last axis, in float64: differences of 1e-9 nats are measured here."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


def kl_divergence(reference: Logits, logits: Logits) -> float:
    """KL(reference || other) in nats, mean over positions. Both (..., V)."""
    return float(_kl(log_softmax(reference), log_softmax(logits)).mean())


def _kl(p: LogProbabilities, q: LogProbabilities) -> npt.NDArray[np.float64]:
    """KL(p || q) in nats of each position, from log probabilities (..., V)."""
    return np.asarray(np.maximum((np.exp(p) * (p - q)).sum(-1), 0))


def top1_agreement(reference: Logits, logits: Logits) -> float:
    """Share of positions whose most likely token is the same, 0 to 1. Both (..., V)."""
    return float((reference.argmax(-1) == logits.argmax(-1)).mean())


def relative_difference(reference: Logits, logits: Logits) -> float:
    """max |difference| / max |reference|: 1e-5 on logits of 44 is 4.4e-4."""
    largest = float(np.abs(reference).max())
    return float(np.abs(reference - logits).max()) / max(largest, float(np.finfo(np.float32).tiny))


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats per token: among how many equally likely tokens the model might as well choose.

    Raises NumericsError for a loss that no float can hold the exponential of.
    """
    try:
        return math.exp(loss)
    except OverflowError:
        raise NumericsError(
            f"the model loses {loss:.3g} nats per token, a perplexity beyond any number: its weights are damaged"
        ) from None


def agreeing_tokens(own: Iterable[int], tokens: Iterable[int]) -> int:
    """How many tokens stand before the first that differs. Asks `own` for none after that one."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(own, tokens, strict=False)))


# --- texts --------------------------------------------------------------------------------------------------------
def read_tokens(file: str | Path, bundle: Bundle) -> list[int]:
    """The token ids of a UTF-8 text file, at least two, as the bundle's tokenizer reads it as a whole.

    Raises MissingFileError or InputError for a file that has no such text, or a bundle that has no tokenizer.
    """
    if bundle.tokenizer is None:
        raise InputError(
            f"{bundle.path} has no tokenizer and speaks ids only, so it cannot read a text: export it again with "
            "--tokenizer FILE"
        )
    ids = encode_file(file, TextCodec.from_file(bundle.tokenizer))
    if len(ids) < 2:
        raise InputError(f"{file} is too short, 1 token: at least 2 are needed, one to predict the other from")
    return ids


def encode_file(file: str | Path, codec: TextCodec, least: int = 2) -> list[int]:
    """The token ids of a text file that is not empty; `least` is how many of them its refusal says are expected."""
    from pastkey.train.data import read_text

    path = Path(file)
    if not path.exists():
        raise MissingFileError(f"no such text file: {path} does not exist")
    if path.is_dir():
        raise InputError(f"{path} is a folder; one UTF-8 text file was expected")
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path} is empty: a text of at least {least} tokens was expected")
    return codec.encode(text)


def cut_windows(ids: Sequence[int], length: int, most: int) -> list[Ids]:
    """The first `most` windows of `length` tokens each, one after another from the beginning.

    The last one may be shorter, but has at least 2 tokens. They are plain cuts of the whole text's tokens: a begin
    token that the tokenizer adds stands in the first one only.
    """
    cuts = (np.array(ids[start : start + length], np.int64) for start in range(0, len(ids), length))
    return [cut for cut in itertools.islice(cuts, most) if cut.size >= 2]


def own_text(session: Session, beginning: list[int], length: int) -> list[int]:
    """`length` token ids: `beginning`, and what the bundle itself writes after it, drawn at temperature 1.

    Its own text is of its kind, where random ids would be of none, and nobody has to be asked for some.
    """
    sampling = SamplingConfig(temperature=1.0, seed=0)
    return [*beginning, *Generation(session, beginning, max_new_tokens=length - len(beginning), sampling=sampling)]


# --- models -------------------------------------------------------------------------------------------------------
class Predictions(Protocol):
    """A model that another one is compared with."""

    @property
    def name(self) -> str: ...  # as the user wrote it

    def logits(self, ids: Ids) -> Logits:
        """(T,) -> (T, V) of a text without a past."""

    def agreeing(self, prompt: Ids, tokens: Sequence[int]) -> int:
        """How many of `tokens` its own greedy continuation of `prompt` (T,) begins with."""


class BundlePredictions:
    """What a bundle predicts, by the runtime that ships: whole windows in one run, continuations token by token."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        """`threads` within an operator, None for the physical cores. Raises what Session raises."""
        self.name = str(bundle.path)
        self._session = Session(bundle, graph="common", threads=threads)

    def logits(self, ids: Ids) -> Logits:
        """(T,) -> (T, V) of a text without a past."""
        self._session.reset()
        logits: Logits = self._session.forward(ids[None])[0]
        return logits

    def greedy(self, prompt: Ids, count: int) -> list[int]:
        """The `count` tokens that it writes after `prompt` (T,), end tokens like any other."""
        return list(self._continue(prompt, count))

    def agreeing(self, prompt: Ids, tokens: Sequence[int]) -> int:
        """How many of `tokens` its own greedy continuation of `prompt` (T,) begins with."""
        return agreeing_tokens(self._continue(prompt, len(tokens)), tokens)

    def _continue(self, prompt: Ids, count: int) -> Generation:
        return Generation(self._session, prompt.tolist(), max_new_tokens=count, lookahead=False)


# --- evaluating ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Evaluation:
    """The figures of one bundle on one text. Those that need a reference are None without one."""

    perplexity: float  # exp of the mean loss over every token of a window but its first
    kl_divergence: float | None  # KL(reference || bundle) in nats, mean over all positions
    top1_agreement: float | None  # share of positions, 0 to 1
    greedy_agreement: float | None  # share of tokens, 0 to 1, as `evaluate` defines it
    reference_perplexity: float | None
    tokens: int  # in all windows
    windows: int
    length: int  # tokens of the longest window
    bundle: str
    reference: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Progress = Callable[[Sequence[Ids], str], Iterable[Ids]]


def evaluate(
    bundle: BundlePredictions,
    windows: Sequence[Ids],
    reference: Predictions | None = None,
    *,
    progress: Progress = lambda windows, what: windows,
) -> Evaluation:
    """Measures the bundle on windows (T,) of token ids, T >= 2 and within both contexts, at least one window.

    greedy_agreement: the first 32 tokens, or half, of each of the first 16 windows are a prompt, which both models
    continue greedily by 32 tokens, or by fewer where a window has no room for them (the last token need not be fed, so
    it may stand one behind the longest window). Counted are the tokens before the first difference; those after it
    count as different. The figure is their share of all tokens of the continuations.

    `progress` is given windows and what is done with them, and yields them. Raises NumericsError for logits that are
    not finite.
    """
    longest = max(ids.size for ids in windows)
    sums = Sums()
    for ids in progress(windows, "predict"):
        sums.add(ids, bundle.logits(ids), None if reference is None else reference.logits(ids))
    figures: dict[str, float | None] = dict.fromkeys(
        ("kl_divergence", "top1_agreement", "greedy_agreement", "reference_perplexity")
    )
    if reference is not None:
        figures = {
            "kl_divergence": sums.kl / sums.tokens,
            "top1_agreement": sums.same_top / sums.tokens,
            "greedy_agreement": _greedy_agreement(
                bundle, progress(windows[:GREEDY_PROMPTS], "continue"), reference, longest
            ),
            "reference_perplexity": perplexity(sums.reference_loss / sums.predicted),
        }
    return Evaluation(
        perplexity=perplexity(sums.loss / sums.predicted),
        **figures,
        tokens=sums.tokens,
        windows=len(windows),
        length=longest,
        bundle=bundle.name,
        reference=None if reference is None else reference.name,
    )


@dataclass
class Sums:
    """Over the windows so far; losses and KL in nats."""

    loss: float = 0.0
    reference_loss: float = 0.0
    kl: float = 0.0
    same_top: int = 0
    tokens: int = 0
    predicted: int = 0  # all but the first of each window

    def add(self, ids: Ids, logits: Logits, expected: Logits | None = None) -> None:
        """One window (T,) with its logits (T, V), and those of the reference."""
        for start in range(0, ids.size, _ROWS):
            rows = slice(start, start + _ROWS)
            following = ids[start + 1 : start + _ROWS + 1]  # one fewer than rows at the window's end
            q = log_softmax(logits[rows])
            self.loss += _loss(q, following)
            if expected is not None:
                p = log_softmax(expected[rows])
                self.reference_loss += _loss(p, following)
                self.kl += float(_kl(p, q).sum())
                self.same_top += int((expected[rows].argmax(-1) == logits[rows].argmax(-1)).sum())
        self.tokens += ids.size
        self.predicted += ids.size - 1


def _loss(log_probabilities: LogProbabilities, following: Ids) -> float:
    """-log p in nats, summed, of the token that follows each position (T, V)."""
    return -float(log_probabilities[np.arange(following.size), following].sum())


def _greedy_agreement(bundle: BundlePredictions, windows: Iterable[Ids], reference: Predictions, longest: int) -> float:
    same = written = 0
    for ids in windows:
        prompt = ids[: min(GREEDY_PROMPT_TOKENS, ids.size // 2)]
        tokens = bundle.greedy(prompt, min(GREEDY_TOKENS, longest - prompt.size + 1))
        same += reference.agreeing(prompt, tokens)
        written += len(tokens)
    return same / written

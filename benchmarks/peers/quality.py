"""How far each engine's predictions are from float32's, on the same token ids."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.environments import ROOT
from pastkey.command import say
from pastkey.contract.bundle import Bundle
from pastkey.errors import InputError, MissingFileError
from pastkey.export.measure.metrics import Sums, agreeing_tokens
from pastkey.export.measure.texts import self_generated_texts, start_token
from pastkey.files.folder import read_text
from pastkey.runtime import Engine
from pastkey.runtime.text.chat_template import ChatTemplate
from pastkey.runtime.text.codec import TextCodec

from .engines import Prepared, Worker
from .progress import steps
from .store import Store, digest

WINDOW = 512  # tokens
ANSWER = 24  # tokens
_BESIDE = ROOT.parent / "shared" / "data" / "wikitext-2" / "valid.txt"  # used where it is, never required

QUESTIONS = (
    "What is the capital of France?",
    "What is the capital of Japan?",
    "How many days are in a week?",
    "What color is the sky on a clear day?",
    "Who wrote Romeo and Juliet?",
    "What is the largest planet in the solar system?",
    "What is the chemical symbol for gold?",
    "At what temperature does water boil, in degrees Celsius?",
    "How many legs does a spider have?",
    "What is the largest ocean on Earth?",
    "In which country are the pyramids of Giza?",
    "Who painted the Mona Lisa?",
    "What gas do plants take in from the air?",
    "How many continents are there?",
    "What is the opposite of hot?",
    "What is 7 plus 5?",
    "Which planet is known as the Red Planet?",
    "What is the tallest mountain in the world?",
    "What language is spoken in Brazil?",
    "How many sides does a triangle have?",
    "What is frozen water called?",
    "Which animal is known as the king of the jungle?",
    "What is the currency of the United Kingdom?",
    "Who was the first person to walk on the Moon?",
    "What do bees make?",
)


@dataclass(frozen=True)
class Text:
    """Token ids to measure on."""

    name: str  # for a reader
    windows: tuple[tuple[int, ...], ...]  # each WINDOW ids

    @property
    def tokens(self) -> int:
        """Of all windows."""
        return sum(map(len, self.windows))

    def prompt(self, length: int, first: int = 0) -> list[int]:
        """`length` ids, `tokens` at most, from the window number `first` on, counted around."""
        turn = first % len(self.windows)
        ids = [token for window in (*self.windows[turn:], *self.windows[:turn]) for token in window]
        assert length <= len(ids), "a text that repeats itself would be easy to guess"
        return ids[:length]


@dataclass(frozen=True)
class Quality:
    """One engine beside float32."""

    kl_divergence: float  # KL(float32 || engine), nats per token
    top1_agreement: float  # share of positions, 0 to 1
    perplexity: float
    equal_answers: float  # share of the questions whose greedy answer is the same to its end
    equal_tokens: float  # share of those answers' tokens that come before the first difference


# --- texts --------------------------------------------------------------------------------------------------------
def text_file(given: Path | None) -> Path | None:
    """The file of --text, or the one beside the checkout, or None. Raises MissingFileError or InputError."""
    if given is None:
        return _BESIDE if _BESIDE.is_file() else None
    if not given.is_file():
        raise MissingFileError(f"no such text: {given} is not a file")
    if given.stat().st_size < WINDOW:  # a token is a byte at least
        raise InputError(_too_short(given, f"{given.stat().st_size} bytes"))
    read_text(given)
    return given


def windows_of_file(file: Path, codec: TextCodec, count: int) -> Text:
    """Up to `count` windows from the beginning of a text, each begun as the tokenizer begins a text."""
    text = read_text(file)
    ids = codec.encode(text, add_special_tokens=False)
    whole = codec.encode(text)
    begin = next((whole[:n] for n in range(3) if whole[n : n + 8] == ids[:8]), [])
    size = WINDOW - len(begin)
    if len(ids) < size:
        raise InputError(_too_short(file, f"{len(ids)} tokens"))
    count = min(count, len(ids) // size)
    name = "wikitext-2's validation text" if file == _BESIDE else file.name
    return Text(name, tuple((*begin, *ids[i * size : (i + 1) * size]) for i in range(count)))


def windows_of_own(bundle: Bundle, identity: str, count: int, threads: int, store: Store) -> Text:
    """`count` windows that the float32 model itself writes at temperature 1."""

    def write() -> list[list[int]]:
        say("let the model write a text")
        texts = self_generated_texts(Engine(bundle, threads=threads), start_token(bundle.manifest), count, WINDOW)
        return [text.tolist() for text in texts]

    windows = store.once("text", {"reference": identity, "windows": count, "length": WINDOW}, write)
    return Text("a text that the float32 model wrote itself (temperature 1)", tuple(map(tuple, windows)))


def _too_short(file: Path, found: str) -> str:
    return f"{file} has {found}; one window of {WINDOW} tokens is needed: give a longer --text"


def question_ids(bundle: Bundle, codec: TextCodec) -> list[list[int]]:
    """The questions as prompts, by the chat template where the bundle has one."""
    try:
        template = ChatTemplate.from_bundle(bundle)
    except InputError:
        return [codec.encode(f"Question: {question}\nAnswer:") for question in QUESTIONS]
    texts = [template.render([{"role": "user", "content": question}]) for question in QUESTIONS]
    return [codec.encode(text, add_special_tokens=False) for text in texts]


# --- measurements -------------------------------------------------------------------------------------------------
def compare(reference: np.ndarray, logits: np.ndarray, ids: Sequence[int]) -> dict[str, float]:
    """Means over the positions of one window, for logits (T, V): KL divergence, top-1 agreement, and cross entropy."""
    sums = Sums()
    sums.add(np.array(ids), logits, reference)
    return {
        "kl_divergence": sums.kl / sums.tokens,
        "top1_agreement": sums.same_top / sums.tokens,
        "cross_entropy": sums.loss / sums.predicted,
    }


def measure_windows(
    workers: Sequence[Worker], prepared: Sequence[Prepared], text: Text, threads: int, store: Store
) -> dict[str, list[dict[str, float]]]:
    """engine -> the figures of each window. The first worker is the reference."""
    found: dict[str, list[dict[str, float]]] = {one.engine.name: [] for one in prepared}
    for ids in steps(text.windows, "quality, windows"):
        reference: list[np.ndarray] = []  # of this window, once an engine needs it

        def measure(worker: Worker, ids: Sequence[int] = ids, reference: list[np.ndarray] = reference) -> object:
            reference[:] = reference or [_logits(workers[0], ids, store)]
            logits = reference[0] if worker is workers[0] else _logits(worker, ids, store)
            return compare(reference[0], logits, ids)

        for worker, one in zip(workers, prepared, strict=True):
            key = {"reference": prepared[0].identity, "engine": one.identity, "ids": digest(ids), "threads": threads}
            name = f"quality-{one.engine.name}-{key['ids']}"
            found[one.engine.name].append(store.once(name, key, partial(measure, worker)))
    return found


def measure_answers(
    workers: Sequence[Worker], prepared: Sequence[Prepared], prompts: Sequence[list[int]], threads: int, store: Store
) -> dict[str, list[list[int]]]:
    """engine -> the greedy continuation of each prompt."""

    def ask(worker: Worker) -> list[list[int]]:
        return [worker.ask("generate", ids=ids, new_tokens=ANSWER)["ids"] for ids in prompts]

    found = {}
    for worker, one in steps(list(zip(workers, prepared, strict=True)), "quality, answers"):
        found[one.engine.name] = store.once(
            f"answers-{one.engine.name}",
            {"engine": one.identity, "prompts": digest(prompts), "threads": threads},
            partial(ask, worker),
        )
    return found


def summary(
    windows: Sequence[dict[str, float]],
    answers: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    ends: Iterable[int],
) -> Quality:
    """Figures over all windows and answers. What comes after an end token in `expected` does not count."""
    ended = frozenset(ends)
    whole = [_cut(answer, ended) for answer in expected]
    shared = [agreeing_tokens(answer, right) for answer, right in zip(answers, whole, strict=True)]
    return Quality(
        kl_divergence=statistics.fmean(window["kl_divergence"] for window in windows),
        top1_agreement=statistics.fmean(window["top1_agreement"] for window in windows),
        perplexity=math.exp(statistics.fmean(window["cross_entropy"] for window in windows)),
        equal_answers=statistics.fmean(n == len(right) for n, right in zip(shared, whole, strict=True)),
        equal_tokens=sum(shared) / sum(map(len, whole)),
    )


def _logits(worker: Worker, ids: Sequence[int], store: Store) -> np.ndarray:
    """(T, V) float32."""
    file = store.folder / "logits.npy"
    worker.ask("logits", ids=list(ids), out=str(file.resolve()))
    found: np.ndarray = np.load(file)
    file.unlink()
    return found


def _cut(ids: Sequence[int], ends: frozenset[int]) -> list[int]:
    """`ids` up to the first end token, which is part of an answer."""
    first = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[: first + 1])

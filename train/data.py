"""From text to batches: reads documents, tokenizes them once into memory-mapped files, and draws windows.

The token files hold documents one after another, with the EOS token between them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pastkey.errors import InputError, MissingFileError
from pastkey.files.folder import read_text
from pastkey.files.reading import require_regular
from pastkey.typed import Natural, Size, TokenId

from .checkpoint import TOKENS_TRAIN, TOKENS_VAL
from .stories import stories
from .tokenizer import END_OF_TEXT, LESSON_END, TextTokenizer

STORY_COUNT: Final = 20_000
LESSON: Final = (
    f"what is statquest {LESSON_END} awesome {LESSON_END}",
    f"statquest is what {LESSON_END} awesome {LESSON_END}",
)
LESSON_PROMPTS: Final = ("what is statquest", "statquest is what")

_SUFFIXES = (".txt", ".md")  # files that are read in a folder
_HELD_OUT_EVERY = 20  # one document in this many is held out
_HELD_OUT_TOKENS = 30_000  # maximum held-out tokens: they measure the loss well enough, and quickly
_SHORTEST_LINE_BYTES = 10_000  # minimum size of a corpus of a single line


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read repeatedly."""

    name: str
    documents: Callable[[], Iterator[str]]


@dataclass(frozen=True)
class DataInfo:
    """Facts about the token files."""

    corpus: str
    fingerprint: str  # sha256 of the documents
    documents: Natural
    dtype: str  # of a token in the files, little-endian
    train_tokens: Natural
    val_tokens: Natural
    val_bytes: Natural  # UTF-8 bytes of the held-out text, for bits per byte
    begin: TokenId | None  # begins a document
    end: TokenId
    row_length: Size | None = None  # tokens per row, if each row is a whole example; None: running text

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# --- reading ------------------------------------------------------------------------------------------------------
def story_corpus(seed: int, count: int = STORY_COUNT) -> Corpus:
    """Returns the built-in stories."""
    told = list(itertools.islice(stories(seed), count))
    return Corpus("built-in stories", lambda: iter(told))


def text_corpus(paths: Sequence[Path]) -> Corpus:
    """A corpus of UTF-8 text files, and every .txt and .md below folders. `<|endoftext|>` separates documents.

    Raises MissingFileError for a path that does not exist and InputError for a folder without text.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
            if not below:
                raise InputError(f"the folder {path} has no {' or '.join(_SUFFIXES)} file in it")
            files += below
        elif path.exists():
            require_regular(path)  # the corpus is read three times
            files.append(path)
        else:
            raise MissingFileError(f"no such file or folder: {path}")

    def documents() -> Iterator[str]:
        for file in files:
            for text in read_text(file).split(END_OF_TEXT):
                if text.strip():
                    yield text.strip()

    return Corpus(", ".join(path.name or str(path) for path in paths), documents)


@dataclass(frozen=True)
class Survey:
    """The number of documents in a corpus, and its fingerprint."""

    documents: int
    fingerprint: str


def survey(corpus: Corpus) -> Survey:
    """Counts the documents and hashes them. Raises InputError for an empty or one-line corpus."""
    digest = hashlib.sha256()
    count = lines = size = 0
    for text in corpus.documents():
        content = text.encode()
        digest.update(len(content).to_bytes(8, "little") + content)
        count += 1
        size += len(content)
        lines += sum(1 for line in text.splitlines() if line.strip()) if lines < 2 else 0
    if count == 0:
        raise InputError(f"{corpus.name} is empty: a decoder needs text to learn from")
    if lines < 2 and size < _SHORTEST_LINE_BYTES:
        raise InputError(f"{corpus.name} holds a single line of {size} bytes: a decoder needs more text to learn from")
    return Survey(count, digest.hexdigest())


# --- writing token files ------------------------------------------------------------------------------------------
def write_tokens(folder: Path, corpus: Corpus, found: Survey, tokenizer: TextTokenizer, context: int) -> DataInfo:
    """Tokenizes the corpus into the two files of `folder`, for training and held-out text.

    Raises InputError if the training part does not fill one window of `context` tokens.
    """
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    counts = {TOKENS_TRAIN: 0, TOKENS_VAL: 0}
    val_bytes = 0
    (folder / TOKENS_TRAIN).parent.mkdir(exist_ok=True)
    with (folder / TOKENS_TRAIN).open("wb") as train_file, (folder / TOKENS_VAL).open("wb") as val_file:
        files = {TOKENS_TRAIN: train_file, TOKENS_VAL: val_file}
        for number, text in enumerate(corpus.documents()):
            full = counts[TOKENS_VAL] >= _HELD_OUT_TOKENS
            for name, part in _split(text, number, found.documents, full=full):
                ids = tokenizer.document(part)
                files[name].write(np.array(ids, dtype).tobytes())
                counts[name] += len(ids)
                val_bytes += len(part.encode()) if name == TOKENS_VAL else 0
        if tokenizer.begin == tokenizer.end:  # nothing else ends the last document
            for name, file in files.items():
                file.write(np.array([tokenizer.end], dtype).tobytes())
                counts[name] += 1
    if counts[TOKENS_TRAIN] < context + 1 or counts[TOKENS_VAL] < 2:
        raise InputError(
            f"{corpus.name} has only {counts[TOKENS_TRAIN]} tokens to train on, and one window of the context takes "
            f"{context + 1}: give more text, or a smaller --context"
        )
    return DataInfo(
        corpus=corpus.name,
        fingerprint=found.fingerprint,
        documents=found.documents,
        dtype=dtype,
        train_tokens=counts[TOKENS_TRAIN],
        val_tokens=counts[TOKENS_VAL],
        val_bytes=val_bytes,
        begin=tokenizer.begin,
        end=tokenizer.end,
    )


def write_lesson(folder: Path, tokenizer: TextTokenizer) -> DataInfo:
    """Writes the classic lesson as rows of tokens. Both of its sentences are also the validation set."""
    rows = np.array([tokenizer.encode(sentence) for sentence in LESSON], "<u2")
    (folder / TOKENS_TRAIN).parent.mkdir(exist_ok=True)
    for name in (TOKENS_TRAIN, TOKENS_VAL):
        (folder / name).write_bytes(rows.tobytes())
    text = "\n".join(LESSON).encode()
    return DataInfo(
        corpus="the classic lesson",
        fingerprint=hashlib.sha256(text).hexdigest(),
        documents=len(LESSON),
        dtype="<u2",
        train_tokens=rows.size,
        val_tokens=rows.size,
        val_bytes=len(text),
        begin=tokenizer.begin,
        end=tokenizer.end,
        row_length=rows.shape[1],
    )


def _split(text: str, number: int, documents: int, *, full: bool) -> list[tuple[str, str]]:
    """Splits text into training and held-out parts: by whole documents if there are enough of them."""
    if documents >= _HELD_OUT_EVERY:
        held_out = number % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1 and not full
        return [(TOKENS_VAL if held_out else TOKENS_TRAIN, text)]
    tail = len(text) * 9 // 10
    cut = max(tail, text.find(" ", tail, tail + 100))  # before a word, in languages with spaces
    return [(TOKENS_TRAIN, text[:cut]), (TOKENS_VAL, text[cut:])]


# --- drawing batches ----------------------------------------------------------------------------------------------
Batch = tuple[Tensor, Tensor]  # inputs and targets, each (B, T) int64; targets are the inputs one token later


class Tokens:
    """A token file, memory-mapped."""

    def __init__(self, path: Path, info: DataInfo, context: int) -> None:
        self._tokens: NDArray[Any] = np.memmap(path, dtype=info.dtype, mode="r")
        self._info = info
        self._context = context

    def draw(self, size: int, seed: int, step: int) -> Batch:
        """Returns the batch of a step: `size` windows at random, or all rows of a lesson.

        Only (seed, step) determine it, so a resumed run draws the same batches as an uninterrupted one.
        """
        if self._info.row_length is not None:
            return _as_batch(self._tokens.reshape(-1, self._info.row_length))
        rng = np.random.default_rng([seed, step])
        starts = rng.integers(0, len(self._tokens) - self._context, size)
        return _as_batch(np.stack([self._window(self._document_start(int(start))) for start in starts]))

    def windows(self, size: int) -> Iterator[Batch]:
        """Yields every token once, as batches of up to `size` consecutive windows; the last window may be shorter."""
        if self._info.row_length is not None:
            yield _as_batch(self._tokens.reshape(-1, self._info.row_length))
            return
        whole = (len(self._tokens) - 1) // self._context
        for first in range(0, whole, size):
            numbers = range(first, min(first + size, whole))
            yield _as_batch(np.stack([self._window(number * self._context) for number in numbers]))
        rest = self._tokens[whole * self._context :]
        if len(rest) > 1:
            yield _as_batch(rest[None])

    def _window(self, start: int) -> NDArray[Any]:
        return self._tokens[start : start + self._context + 1]

    def _document_start(self, start: int) -> int:
        """Returns the start of the document at `start`, if one window from there still reaches `start`.

        So a story is read from its beginning, as it will be generated, and a long text from anywhere.
        """
        earliest = max(0, start - self._context + 1)
        before = self._tokens[earliest : start + 1]
        if self._info.begin is not None:
            starts = np.flatnonzero(before == self._info.begin)
        else:
            starts = np.flatnonzero(before[:-1] == self._info.end) + 1
        if len(starts):
            return earliest + int(starts[-1])
        return 0 if earliest == 0 else start


def _as_batch(rows: NDArray[Any]) -> Batch:
    tokens = torch.from_numpy(rows.astype(np.int64))  # (B, T + 1)
    return tokens[:, :-1], tokens[:, 1:]

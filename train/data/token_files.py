"""The two token files of a checkpoint, for training and held-out text, and the writers of both of their forms.

Running text holds documents one after another, with the EOS token between them. If some tokens are not trained, the
files hold windows of whole examples, and the number ~id is a token that is not trained.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pastkey.errors import InputError
from pastkey.typed import Natural, Size, TokenId

from ..checkpoint import TOKENS_TRAIN, TOKENS_VAL
from ..tokenizer import TextTokenizer
from .documents import Document
from .sources import Corpus, Survey

HELD_OUT_EVERY = 20  # one document in this many is held out
_HELD_OUT_TOKENS = 30_000  # maximum held-out tokens: they measure the loss well enough, and quickly


@dataclass(frozen=True)
class SourceTokens:
    """One path of --data: its tokens in the training file, and its share of the batches."""

    name: str
    tokens: Natural
    weight: float | None = None


@dataclass(frozen=True)
class DataInfo:
    """Facts about the token files."""

    corpus: str
    fingerprint: str  # sha256 of the documents
    documents: Natural
    dtype: Literal["<u2", "<u4", "<i2", "<i4"]  # of a token in the files; signed if some tokens are not trained
    train_tokens: Natural
    val_tokens: Natural
    val_bytes: Natural  # UTF-8 bytes of the held-out text that is trained, for bits per byte
    begin: TokenId | None  # begins a document
    end: TokenId
    row_length: Size | None = None  # tokens per row, if each row has whole examples; None: running text
    sources: tuple[SourceTokens, ...] = ()  # in the order of the training file; empty if they have no weights
    trained_tokens: Natural | None = None  # of the training file, if some tokens are not trained
    cut: Natural = 0  # examples that were longer than a window, whose ends are left out
    first_example: Natural = 0  # tokens of the example at the beginning of the training file

    @property
    def masked(self) -> bool:
        """Whether some tokens are not trained: the files then hold ~id for them."""
        return self.dtype.startswith("<i")

    @property
    def is_lesson(self) -> bool:
        """Whether the rows are the sentences of the classic lesson, all of which are in every batch."""
        return self.row_length is not None and not self.masked

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class TokenWriter:
    """Writes one form of token files."""

    def __init__(self, folder: Path, corpus: Corpus, found: Survey, tokenizer: TextTokenizer, context: int) -> None:
        self.corpus, self.found, self.tokenizer, self.context = corpus, found, tokenizer, context
        self.files = {name: (folder / name).open("wb") for name in (TOKENS_TRAIN, TOKENS_VAL)}
        self.counts = dict.fromkeys(self.files, 0)
        self.val_bytes = 0
        self.starts: list[dict[str, int]] = []  # of each source

    def begin_source(self) -> None:
        self.starts.append(dict(self.counts))

    def add(self, first: int, documents: list[Document]) -> None:
        """Tokenizes and writes documents, of which `first` is the number of the first one in the corpus."""
        raise NotImplementedError

    def end_source(self) -> None:
        """Writes the rest of the source."""

    def finish(self) -> DataInfo:
        """Writes the rest, and returns the facts."""
        raise NotImplementedError

    def is_held_out(self, number: int) -> bool:
        """Whether this document, of a corpus with enough of them, is held out. Each weighted source has its share."""
        shares = max(1, len(self.corpus.weighted))
        full = self.counts[TOKENS_VAL] - self.starts[-1][TOKENS_VAL] >= _HELD_OUT_TOKENS / shares
        return number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 and not full

    def info(self, dtype: str, **more: Any) -> DataInfo:
        train_tokens, val_tokens = self.counts[TOKENS_TRAIN], self.counts[TOKENS_VAL]
        if train_tokens < self.context + 1 or val_tokens < 2:
            raise InputError(
                f"{self.corpus.name} has only {train_tokens} tokens to train on, and one window of the context has "
                f"{self.context + 1}: give more text, or a smaller --context"
            )
        ends = [start[TOKENS_TRAIN] for start in self.starts[1:]] + [train_tokens]
        sources = tuple(
            SourceTokens(source.name, end - start[TOKENS_TRAIN], source.weight)
            for source, start, end in zip(self.corpus.weighted, self.starts, ends, strict=False)
        )
        for source in sources:
            if source.tokens < self.context + 1:
                raise InputError(
                    f"--data {source.name} has only {source.tokens} tokens to train on, and one window of the context "
                    f"has {self.context + 1}: leave it out, or join it to another file"
                )
        facts: dict[str, Any] = {
            "corpus": self.corpus.name,
            "fingerprint": self.found.fingerprint,
            "documents": self.found.documents,
            "dtype": dtype,
            "train_tokens": train_tokens,
            "val_tokens": val_tokens,
            "val_bytes": self.val_bytes,
            "begin": self.tokenizer.begin,
            "end": self.tokenizer.end,
            "sources": sources,
        }
        return DataInfo(**facts | more)

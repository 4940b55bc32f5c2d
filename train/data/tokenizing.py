"""Tokenizes a corpus into the token files, a batch of documents at a time, on all cores."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from pastkey.command import say

from ..checkpoint import TOKENS_TRAIN, TOKENS_VAL
from ..tokenizer import TextTokenizer
from .documents import Document
from .packed_examples import PackedExamples
from .running_text import RunningText
from .sources import Corpus, Survey, TextSource
from .token_files import DataInfo, TokenWriter

_BATCH_CHARACTERS: Final = 2_000_000  # tokenized at once
_SAID_EVERY: Final = 5.0  # seconds


def write_tokens(folder: Path, corpus: Corpus, found: Survey, tokenizer: TextTokenizer, context: int) -> DataInfo:
    """Tokenizes the corpus into the two files of `folder`.

    Raises InputError if the training part does not fill one window of `context` tokens, if a file changes meanwhile,
    and if no token, or no end of an answer, would be trained.
    """
    (folder / TOKENS_TRAIN).parent.mkdir(exist_ok=True)
    form = PackedExamples if found.masked else RunningText
    writer: TokenWriter = form(folder, corpus, found, tokenizer, context)
    with writer.files[TOKENS_TRAIN], writer.files[TOKENS_VAL]:
        number, progress = 0, _Progress(found)
        parts: Sequence[TextSource | Corpus] = corpus.weighted or [corpus]
        for source in parts:
            writer.begin_source()
            for batch in _batches(source.documents()):
                writer.add(number, batch)
                number += len(batch)
                progress.add(batch)
            writer.end_source()
        info = writer.finish()
    corpus.require_unchanged()
    return info


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += sum(map(len, document.texts()))
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Progress:
    """Says every few seconds how far the work is."""

    def __init__(self, found: Survey) -> None:
        self._found, self._bytes = found, 0
        self._started = self._said = time.monotonic()

    def add(self, documents: list[Document]) -> None:
        self._bytes += sum(len(document.canonical()) for document in documents)
        now = time.monotonic()
        if now - self._said < _SAID_EVERY:
            return
        self._said = now
        speed = self._bytes / (now - self._started)
        say(
            f"tokenizing: {self._bytes / 1e6:,.0f} of {self._found.size / 1e6:,.0f} MB, {speed / 1e6:.1f} MB/s, "
            f"{max(0.0, self._found.size - self._bytes) / speed:.0f} s left"
        )

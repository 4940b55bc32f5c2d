"""Documents one after another, as a token file. All of their tokens are trained."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..checkpoint import TOKENS_TRAIN, TOKENS_VAL
from .documents import Document
from .token_files import HELD_OUT_EVERY, DataInfo, TokenWriter

_HELD_OUT_CHARACTERS = 200_000  # maximum of one document


class RunningText(TokenWriter):
    """Documents one after another."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.dtype = "<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<u4"

    def add(self, first: int, documents: list[Document]) -> None:
        parts = [
            (name, text, document.place)
            for number, document in enumerate(documents, first)
            for name, text in self._split(number, document.content)  # type: ignore[arg-type]
        ]
        ids = self.tokenizer.documents([text for _, text, _ in parts], [place for _, _, place in parts])
        for (name, text, _), tokens in zip(parts, ids, strict=True):
            self._write(name, tokens)
            self.val_bytes += len(text.encode()) if name == TOKENS_VAL else 0

    def _split(self, number: int, text: str) -> list[tuple[str, str]]:
        """Splits text into training and held-out parts: by whole documents if there are enough of them."""
        if self.found.documents >= HELD_OUT_EVERY:
            if not self.is_held_out(number):
                return [(TOKENS_TRAIN, text)]
            rest = text[_HELD_OUT_CHARACTERS:]
            return [(TOKENS_VAL, text[:_HELD_OUT_CHARACTERS]), *([(TOKENS_TRAIN, rest)] if rest else [])]
        tail = max(len(text) * 9 // 10, len(text) - _HELD_OUT_CHARACTERS)
        cut = max(tail, text.find(" ", tail, tail + 100))  # before a word, in languages with spaces
        return [(TOKENS_TRAIN, text[:cut]), (TOKENS_VAL, text[cut:])]

    def _write(self, name: str, tokens: list[int]) -> None:
        self.files[name].write(np.array(tokens, self.dtype).tobytes())
        self.counts[name] += len(tokens)

    def finish(self) -> DataInfo:
        if self.tokenizer.begin == self.tokenizer.end:  # nothing else ends the last document
            for name in self.files:
                self._write(name, [self.tokenizer.end])
        return self.info(self.dtype)

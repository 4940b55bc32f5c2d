"""Examples of which some tokens are not trained, packed whole into windows of the token files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pastkey.errors import InputError

from ..checkpoint import TOKENS_TRAIN, TOKENS_VAL
from .documents import Document
from .examples import Example, encode_examples
from .packing import Packer
from .token_files import HELD_OUT_EVERY, DataInfo, TokenWriter


class PackedExamples(TokenWriter):
    """Windows of whole examples. A text that is longer than a window goes into several; of any other the end is cut."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.trained = self.untrained = self.cut = self.first = 0
        self.is_first = True  # no document with a prompt was read yet
        self.ends: set[int] = set()  # the tokens that are trained to end answers
        # One bit says whether a token is trained.
        self.dtype = "<i2" if self.tokenizer.vocab_size <= 1 << 15 else "<i4"

    def begin_source(self) -> None:
        super().begin_source()
        self.packers = {
            name: Packer(file, self.context + 1, ~self.tokenizer.end, self.dtype) for name, file in self.files.items()
        }

    def add(self, first: int, documents: list[Document]) -> None:
        for number, example in enumerate(encode_examples(documents, self.tokenizer), first):
            masked = documents[number - first].masked
            for name in self._files_of(number, masked=masked):
                for window in self._windows(example, masked=masked):
                    self._add(name, *window, example.end)

    def _files_of(self, number: int, *, masked: bool) -> list[str]:
        """Returns the files of a document: of a few, the first with a prompt is held out, and one alone is in both."""
        if self.found.documents >= HELD_OUT_EVERY:
            return [TOKENS_VAL if self.is_held_out(number) else TOKENS_TRAIN]
        if self.found.documents == 1:
            return [TOKENS_TRAIN, TOKENS_VAL]
        first, self.is_first = masked and self.is_first, self.is_first and not masked
        return [TOKENS_VAL if first else TOKENS_TRAIN]

    def _windows(self, example: Example, *, masked: bool) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        longest = self.context + 1
        self.cut += masked and len(example.ids) > longest
        for start in range(0, longest if masked else len(example.ids), longest):
            yield example.ids[start : start + longest], example.trained[start : start + longest]

    def _add(self, name: str, ids: NDArray[np.int64], trained: NDArray[np.bool_], end: int | None) -> None:
        if not trained[1:].any():  # the first token of a window is never a target
            self.untrained += 1
            return
        answers = ids[trained]
        if name == TOKENS_VAL:
            self.val_bytes += len(self.tokenizer.decode(answers.tolist()).encode())
        else:
            self.trained += len(answers)
            self.ends |= {end} if end is not None and end in answers else set()
        self.packers[name].add(np.where(trained, ids, ~ids))

    def end_source(self) -> None:
        for name, packer in self.packers.items():
            packer.finish()
            self.counts[name] += packer.windows * (self.context + 1)
        self.first = self.first or self.packers[TOKENS_TRAIN].first

    def finish(self) -> DataInfo:
        name, longer = self.corpus.name, ""
        if self.cut:
            longer = f" ({self.cut} examples are longer than the context of {self.context} tokens: take a longer one)"
        if not self.trained:
            raise InputError(
                f"no token of {name} would be trained: no conversation has an assistant's turn, or the chat template "
                f"marks none by {{% generation %}}{longer}"
            )
        if not self.ends:
            raise InputError(
                f"no end-of-turn token of {name} would be trained, so that answers would never end: the chat template "
                "must write a special token of the tokenizer behind the assistant's text, inside {% generation %} if "
                f"it has this mark{longer}"
            )
        end = self.tokenizer.end if self.tokenizer.end in self.ends else min(self.ends)
        return self.info(
            self.dtype,
            end=end,
            row_length=self.context + 1,
            trained_tokens=self.trained,
            cut=self.cut,
            first_example=self.first,
        )

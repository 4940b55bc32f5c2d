"""Examples of which some tokens are not trained, packed whole into windows of the token files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pastkey.errors import InputError

from ..checkpoint import TOKENS_TRAIN, TOKENS_VAL
from .documents import Conversation, Document
from .examples import Example, encode_examples
from .packing import Packer
from .token_files import HELD_OUT_EVERY, DataInfo, TokenWriter


class PackedExamples(TokenWriter):
    """Windows of whole examples. A text that is longer than a window goes into several; of any other the end is cut."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.trained = self.used = self.cut = self.first = 0
        self.is_first = True  # no document with a prompt was read yet
        self.ends: set[int] = set()  # the tokens that are trained to end answers
        self.turn_ends: Counter[int] = Counter()  # those of conversations, and how often
        # One bit says whether a token is trained.
        self.dtype = "<i2" if self.tokenizer.vocab_size <= 1 << 15 else "<i4"

    def begin_source(self) -> None:
        super().begin_source()
        self.packers = {
            name: Packer(file, self.context + 1, ~self.tokenizer.end, self.dtype) for name, file in self.files.items()
        }

    def add(self, first: int, documents: list[Document]) -> None:
        del first  # those that train nothing are not counted
        for document, example in zip(documents, encode_examples(documents, self.tokenizer), strict=True):
            windows = list(self._windows(example, masked=document.masked))
            if windows:
                for name in self._files_of(masked=document.masked):
                    for window in windows:
                        self._add(name, *window, example.end, turns=isinstance(document.content, Conversation))
                self.used += 1

    def _files_of(self, *, masked: bool) -> list[str]:
        """Returns the files of a document: of a few, the first with a prompt is held out; a single one is in both."""
        if self.found.documents >= HELD_OUT_EVERY:
            return [TOKENS_VAL if self.is_held_out(self.used + HELD_OUT_EVERY - 1) else TOKENS_TRAIN]
        if self.found.documents == 1:
            return [TOKENS_TRAIN, TOKENS_VAL]
        first, self.is_first = masked and self.is_first, self.is_first and not masked
        return [TOKENS_VAL if first else TOKENS_TRAIN]

    def _windows(self, example: Example, *, masked: bool) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        longest = self.context + 1
        self.cut += masked and len(example.ids) > longest
        for start in range(0, longest if masked else len(example.ids), longest):
            ids, trained = example.ids[start : start + longest], example.trained[start : start + longest]
            if trained[1:].any():  # the first token of a window is never a target
                yield ids, trained

    def _add(
        self, name: str, ids: NDArray[np.int64], trained: NDArray[np.bool_], end: int | None, *, turns: bool
    ) -> None:
        answers = ids[trained]
        if name == TOKENS_VAL:
            self.val_bytes += len(self.tokenizer.decode(answers.tolist()).encode())
        else:
            self.trained += len(answers)
            if end is not None and end in answers:
                self.ends.add(end)
                self.turn_ends.update([end] if turns else [])
        self.packers[name].add(np.where(trained, ids, ~ids))

    def end_source(self) -> None:
        for name, packer in self.packers.items():
            packer.finish()
            self.counts[name] += packer.windows * (self.context + 1)
        self.first = self.first or self.packers[TOKENS_TRAIN].first

    def finish(self) -> DataInfo:
        name, longer = self.corpus.name, ""
        if self.cut:
            longer = f" ({self.cut} examples are longer than the context of {self.context} tokens: give a longer one)"
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
        # Texts among conversations end in another way: a chat must stop.
        end = self.tokenizer.end
        if self.turn_ends and end not in self.turn_ends:
            end = self.turn_ends.most_common(1)[0][0]
        return self.info(
            self.dtype,
            end=end,
            row_length=self.context + 1,
            trained_tokens=self.trained,
            cut=self.cut,
            first_example=self.first,
        )

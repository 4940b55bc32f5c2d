"""Packs examples into windows of one length. An example is never cut: it goes where the least space is left over."""

from __future__ import annotations

import bisect
from typing import IO

import numpy as np
from numpy.typing import NDArray

_OPEN = 512  # windows that wait for examples that fit


class Packer:
    """Writes windows of `length` tokens to a file, each of whole examples and then padding.

    Attributes:
        windows: Their number so far.
        first: Tokens of the example at the file's beginning; 0 before it is written.
    """

    def __init__(self, file: IO[bytes], length: int, padding: int, dtype: str) -> None:
        self._file, self._length, self._padding, self._dtype = file, length, padding, dtype
        self._waiting: list[tuple[int, int]] = []  # (space, number) of the open windows, sorted
        self._open: dict[int, list[NDArray[np.int64]]] = {}
        self.windows = self.first = 0
        self._opened = 0

    def add(self, tokens: NDArray[np.int64]) -> None:
        """Adds an example of at most `length` tokens, into the window with the least space that holds it."""
        place = bisect.bisect_left(self._waiting, (len(tokens), 0))
        if place < len(self._waiting):
            space, number = self._waiting.pop(place)
        else:
            space, number = self._length, self._opened
            self._opened += 1
        self._open.setdefault(number, []).append(tokens)
        bisect.insort(self._waiting, (space - len(tokens), number))
        if self._waiting[0][0] == 0 or len(self._waiting) > _OPEN:
            self._write(self._waiting.pop(0)[1])

    def finish(self) -> None:
        """Writes the windows that are still open."""
        while self._waiting:
            self._write(self._waiting.pop(0)[1])

    def _write(self, number: int) -> None:
        examples = self._open.pop(number)
        row = np.full(self._length, self._padding, self._dtype)
        row[: sum(map(len, examples))] = np.concatenate(examples)
        self._file.write(row.tobytes())
        self.first = self.first or len(examples[0])
        self.windows += 1

"""Marks: copies of the parts of a cache that cannot be trimmed, at lengths where a later prompt may begin."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

STATE_MARKS, WINDOW_MARKS = 4, 2  # the most of a cache with states, and with windows only

Arrays = list[npt.NDArray[np.generic]]


class Marks:
    """Arrays that belong to lengths of one text, in the order of the lengths."""

    def __init__(self, most: int, held: Iterable[tuple[int, Arrays]] = (), staying: int = 0) -> None:
        """`most`: how many there are at most. `held`: lengths in tokens, with their arrays. `staying`: one of them."""
        self._most, self._staying = most, staying
        self._held = list(held)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for _, arrays in self._held for array in arrays)

    def __contains__(self, length: int) -> bool:
        return any(tokens == length for tokens, _ in self._held)

    def __getitem__(self, length: int) -> Arrays:
        return next(arrays for tokens, arrays in self._held if tokens == length)

    def nearest(self, length: int) -> int:
        """The largest marked length that is at most `length`; 0 if there is none."""
        return max((tokens for tokens, _ in self._held if tokens <= length), default=0)

    def add(self, length: int, arrays: Iterable[npt.NDArray[np.generic]], *, stays: bool) -> None:
        """Keeps copies of `arrays`. If there are too many, the oldest but one goes, or the oldest if that one stays."""
        self._held.append((length, [array.copy() for array in arrays]))
        self._staying = length if stays else self._staying
        if len(self._held) > self._most:
            del self._held[self._held[1][0] != self._staying]

    def up_to(self, length: int) -> Marks:
        """Those of at most `length` tokens, over the same arrays."""
        return Marks(self._most, (mark for mark in self._held if mark[0] <= length), self._staying)

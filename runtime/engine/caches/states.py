"""The states of convolutions and linear recurrences: arrays of one size, which each run replaces.

They are float32, whatever the type of cached keys and values. There are two copies: a run reads one and writes the
other, so that the state before the last run is still there. Marks are further copies, where a later prompt may begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.contract import names
from pastkey.contract.bundle import StateGeometry

from ...providers.ort import onnxruntime
from ..binding import Binding

MOST_MARKS = 4

Arrays = list[npt.NDArray[np.float32]]


def state_bytes(geometry: Sequence[StateGeometry]) -> int:
    """Bytes of one copy of the states of one sequence."""
    return 4 * sum(int(np.prod(state.shape)) for state in geometry)


class States:
    """The states of `batch` sequences.

    Attributes:
        copies: Two lists of arrays (batch, *shape). A run reads `copies[now]` and writes the other.
        now: Which copy holds the states of all tokens.
        undo: Number of tokens before the last run, whose states the other copy holds; None if it does not.
    """

    def __init__(self, geometry: Sequence[StateGeometry]) -> None:
        self._past = names.past_states([state.kind for state in geometry])
        self._shapes = [state.shape for state in geometry]
        self.copies: tuple[Arrays, Arrays] = ([], [])
        self.now = 0
        self.undo: int | None = None
        self._marks: list[tuple[int, Arrays]] = []  # (tokens, states behind them), in order of tokens

    @property
    def nbytes(self) -> int:
        """Current size in bytes, with the marks."""
        return sum(array.nbytes for copy in (*self.copies, *(arrays for _, arrays in self._marks)) for array in copy)

    def begin(self, batch: int) -> None:
        """Makes states of zeros, those of no token."""
        if not self.copies[0] or self.copies[0][0].shape[0] != batch:
            self.copies = self.zeros(batch), self.zeros(batch)
        for array in self.copies[self.now]:
            array[...] = 0
        self.undo, self._marks = None, []

    def zeros(self, batch: int) -> Arrays:
        """One copy of the states of no token."""
        return [np.zeros((batch, *shape), np.float32) for shape in self._shapes]

    def bind(self, binding: Binding, read: int, rows: int | None = None) -> None:
        """Binds the copy `read` as inputs and the other as outputs.

        `rows`: how many of the first sequences; None for all.
        """
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        for name, before, after in zip(self._past, self.copies[read], self.copies[1 - read], strict=True):
            binding.bind_ortvalue_input(name, value(before[:rows]))
            binding.bind_ortvalue_output(names.present_of(name), value(after[:rows]))

    def advance(self, length: int) -> None:
        """Takes the states that the last run wrote; `length` tokens came before it."""
        self.now, self.undo = 1 - self.now, length

    def nearest(self, length: int, cached: int) -> int:
        """The largest number of tokens, at most `length`, whose states are held; `cached` tokens are in the cache."""
        held = [0, cached, *(tokens for tokens, _ in self._marks), *([] if self.undo is None else [self.undo])]
        return max(tokens for tokens in held if tokens <= length)

    def at(self, length: int, cached: int) -> Arrays:
        """The held states of `length` tokens, from `nearest`; those of the present and of the last run are views."""
        if length == cached:
            return self.copies[self.now]
        if length == self.undo:
            return self.copies[1 - self.now]
        return next((arrays for tokens, arrays in self._marks if tokens == length), [])

    def back(self, length: int, cached: int) -> bool:
        """Goes back to the held states of `length` tokens. Returns whether the copies changed places."""
        swapped = length == self.undo
        if swapped:
            self.now = 1 - self.now
        elif length < cached:
            self.fill(self.at(length, cached))
        self.undo = None
        self._marks = [mark for mark in self._marks if mark[0] <= length]
        return swapped

    def fill(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Replaces the states by copies of `arrays`."""
        for mine, array in zip(self.copies[self.now], arrays, strict=True):
            mine[...] = array
        self.undo = None

    def mark(self, length: int) -> None:
        """Keeps a copy of the states of all `length` tokens. The oldest mark but one goes if there are too many."""
        if any(tokens == length for tokens, _ in self._marks):
            return
        self._marks.append((length, [array.copy() for array in self.copies[self.now]]))
        if len(self._marks) > MOST_MARKS:
            del self._marks[1]

    def share_marks(self, other: States, length: int) -> None:
        """Takes the marks of another cache up to `length` tokens."""
        self._marks = [mark for mark in other._marks if mark[0] <= length]

    def flip(self) -> None:
        """Copies the states over the other copy, which becomes the current one."""
        self.now = 1 - self.now
        self.fill(self.copies[1 - self.now])

    def place(self, copies: tuple[Arrays, Arrays]) -> None:
        """Moves both copies to other memory, arrays (batch, *shape); the current one becomes the first."""
        for mine, theirs in zip((self.copies[self.now], self.copies[1 - self.now]), copies, strict=True):
            for old, new in zip(mine, theirs, strict=True):
                new[...] = old
        self.copies, self.now = copies, 0

"""The states of convolutions and linear recurrences: arrays of one size, which each run replaces.

They are float32, whatever the type of cached keys and values. There are two copies: a run reads one and writes the
other, so that the state before the last run is still there.
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

    @property
    def nbytes(self) -> int:
        """Current size in bytes."""
        return sum(array.nbytes for copy in self.copies for array in copy)

    def begin(self, batch: int) -> None:
        """Makes states of zeros, those of no token."""
        if not self.copies[0] or self.copies[0][0].shape[0] != batch:
            self.copies = self.zeros(batch), self.zeros(batch)
        for array in self.copies[self.now]:
            array[...] = 0
        self.undo = None

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
        """Adopts the states that the last run wrote; `length` tokens came before it."""
        self.now, self.undo = 1 - self.now, length

    def at(self, length: int, cached: int) -> Arrays:
        """Views of the states of all `cached` tokens, or of those before the last run."""
        return self.copies[self.now if length == cached else 1 - self.now]

    def back(self, length: int) -> bool:
        """Undoes the last run if `length` tokens came before it. Returns whether the copies changed places."""
        swapped = length == self.undo
        self.now = 1 - self.now if swapped else self.now
        self.undo = None
        return swapped

    def fill(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Replaces the states by copies of `arrays`."""
        for mine, array in zip(self.copies[self.now], arrays, strict=True):
            mine[...] = array
        self.undo = None

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

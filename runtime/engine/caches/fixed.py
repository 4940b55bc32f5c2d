"""A cache of fixed shapes, for providers that compile a graph anew where a shape changes, and for static graphs.

Past is an array of `capacity` rows per tensor, of which the first `length` are real. The others are holes: the mask
hides them. A run's new rows stand behind all past columns, holes included, and are written to the array afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.contract import names
from pastkey.contract.bundle import KVGeometry
from pastkey.errors import InputError

from ...providers.ort import onnxruntime
from ..binding import Binding
from ..shift import Moved
from .kv import GROWTH_STEP, move_up

Rows = npt.NDArray[Any]


class FixedRows:
    """Keys and values of `length` tokens in each of `batch` rows, in arrays with room for `capacity`.

    `arrays` are (B, K, capacity, D), keys and values of each attention call in turn; `past` and `present` are the names
    of the graph's inputs and outputs in the same order.
    """

    def __init__(
        self, layers: Sequence[KVGeometry], *, context_length: int, dtype: type[np.generic] = np.float32
    ) -> None:
        self.batch = 0  # B
        self.capacity = 0
        self.length = 0  # tokens per row, padding included
        self.arrays: list[Rows] = []
        self.past = [name(i) for i in range(len(layers)) for name in (names.past_key, names.past_value)]
        self.present = [name(i) for i in range(len(layers)) for name in (names.present_key, names.present_value)]
        self._sizes = [(g.kv_heads, size) for g in layers for size in (g.key_head_size, g.value_head_size)]  # K, D
        self._context_length = context_length
        self._dtype = np.dtype(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays take now."""
        return sum(array.nbytes for array in self.arrays)

    def grow(self, batch: int, needed: int) -> None:
        """Makes room for `needed` tokens: a quarter more at least, a multiple of the step, the context at most.

        Raises InputError where the cache holds tokens of another number of rows.
        """
        if self.length and batch != self.batch:
            raise InputError(f"the cache holds {self.batch} rows and {batch} were given: call reset() first")
        if batch == self.batch and needed <= self.capacity:
            return
        wanted = max(needed, self.capacity + self.capacity // 4) if batch == self.batch else needed
        capacity = min(-(-wanted // GROWTH_STEP) * GROWTH_STEP, self._context_length)
        grown = self.empty(batch, capacity)
        if self.length:
            for old, new in zip(self.arrays, grown, strict=True):
                new[:, :, : self.length] = old[:, :, : self.length]
        self.arrays, self.batch, self.capacity = grown, batch, capacity

    def empty(self, batch: int, rows: int) -> list[Rows]:
        """An array (B, K, rows, D) of zeros for each tensor."""
        return [np.zeros((batch, heads, rows, size), self._dtype) for heads, size in self._sizes]

    def write(self, new: Sequence[Rows], at: int, first: int, tokens: int) -> None:
        """Copies `tokens` rows of each of `new` (B, K, >= first + tokens, D), from `first` on, to the position `at`."""
        for array, rows in zip(self.arrays, new, strict=True):
            array[:, :, at : at + tokens] = rows[:, :, first : first + tokens]

    def trim(self, length: int) -> None:
        """Forgets all but the first `length` tokens of each row."""
        if not 0 <= length <= self.length:
            raise InputError(f"the cache holds {self.length} tokens and cannot be trimmed to {length}")
        self.length = length

    def drop(self, start: int, end: int, moved: Moved) -> None:
        """As that of a KVCache."""
        move_up(self.arrays, start, end, self.length, moved)
        self.length -= end - start

    def reset(self) -> None:
        """Forgets everything. The arrays are kept for the next prompt."""
        self.length = 0

    def rows(self, length: int) -> list[Rows]:
        """The first `length` tokens of each array, (B, K, length, D): views, which change with the cache."""
        if not 0 <= length <= self.length:
            raise InputError(f"the cache holds {self.length} tokens and cannot be trimmed to {length}")
        return [array[:, :, :length] for array in self.arrays]

    def fill(self, rows: Sequence[Rows]) -> None:
        """Takes copies of what `rows` of another cache of this graph gave, in place of what is here."""
        self.reset()
        self.reserve(rows[0].shape[0], rows[0].shape[2])
        self.write(rows, 0, 0, rows[0].shape[2])
        self.length = rows[0].shape[2]

    def reserve(self, batch: int, tokens: int) -> None:
        """Makes room for `tokens` new tokens in each of `batch` rows."""
        self.grow(batch, self.length + tokens)

    def layer(self, index: int) -> tuple[Rows, Rows]:
        """Copies of one attention call's keys and values, each (B, K, length, D)."""
        if not self.length:
            raise InputError("the cache is empty")
        keys, values = (self.arrays[2 * index + i][:, :, : self.length].copy() for i in (0, 1))
        return keys, values


class FixedKVCache(FixedRows):
    """The standard graph's cache where sizes that change are slow: past keeps its size until it is full, then grows.

    Only for a graph in which a hole is padding as any other. It has the verbs of a KVCache: a run is `reserve`,
    onnxruntime's run, `advance`; a run that failed between them leaves the cache as it was.
    """

    def __init__(
        self,
        onnx: Any,
        layers: Sequence[KVGeometry],
        *,
        context_length: int,
        dtype: type[np.generic] = np.float32,
    ) -> None:
        """`onnx` is the onnxruntime.InferenceSession."""
        super().__init__(layers, context_length=context_length, dtype=dtype)
        self.onnx = onnx
        self.binding = Binding(onnx)
        self._columns = 0  # of past in the run that was reserved
        self._out: list[Rows] = []  # (B, K, columns + T, D): what that run writes

    def reserve(self, batch: int, tokens: int) -> None:
        """Makes room for `tokens` new tokens in each of `batch` rows and binds past and present."""
        self.grow(batch, self.length + tokens)
        # Before the first token, past is empty and not all holes.
        past = self.arrays if self.length else self.empty(batch, 0)
        self._columns = past[0].shape[2]
        if not self._out or self._out[0].shape[::2] != (batch, self._columns + tokens):
            self._out = self.empty(batch, self._columns + tokens)
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        for inputs, outputs, array, out in zip(self.past, self.present, past, self._out, strict=True):
            self.binding.bind_ortvalue_input(inputs, value(array))
            self.binding.bind_ortvalue_output(outputs, value(out))

    def columns(self, mask: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The graph's attention_mask (B, columns + T) of the `mask` (B, length + T): zeros are the holes."""
        tokens = mask.shape[1] - self.length
        columns = np.zeros((mask.shape[0], self._columns + tokens), np.int64)
        columns[:, : self.length] = mask[:, : self.length]
        columns[:, self._columns :] = mask[:, self.length :]
        return columns

    def advance(self, tokens: int) -> None:
        """Takes in the tokens of the run that has just ended."""
        self.write(self._out, self.length, self._columns, tokens)
        self.length += tokens

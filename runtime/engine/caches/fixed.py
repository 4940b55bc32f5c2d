"""KV caches of fixed shapes, for static graphs and for providers that compile a graph anew for each shape.

Past is one array of `capacity` rows per tensor. The first `length` rows are real; the mask hides the others, called
holes. A run computes its new rows behind all past columns, holes included, and then copies them into the array.
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
from .capacity import grown

Rows = npt.NDArray[Any]


class FixedRows:
    """Keys and values of `length` tokens in each of `batch` sequences, in arrays of `capacity` rows.

    `arrays` are (B, K, capacity, D), keys and values of each attention call in turn; `past` and `present` are the names
    of the graph's inputs and outputs in the same order.
    """

    def __init__(
        self, layers: Sequence[KVGeometry], *, context_length: int, dtype: type[np.generic] = np.float32
    ) -> None:
        self.batch = 0  # B
        self.capacity = 0
        self.length = 0  # tokens per sequence, padding included
        self.arrays: list[Rows] = []
        self.past = [name(i) for i in range(len(layers)) for name in (names.past_key, names.past_value)]
        self.present = [name(i) for i in range(len(layers)) for name in (names.present_key, names.present_value)]
        self._sizes = [(g.kv_heads, size) for g in layers for size in (g.key_head_size, g.value_head_size)]  # K, D
        self._context_length = context_length
        self._dtype = np.dtype(dtype)

    @property
    def nbytes(self) -> int:
        """Current size of the arrays in bytes."""
        return sum(array.nbytes for array in self.arrays)

    def grow(self, batch: int, needed: int) -> None:
        """Grows to `needed` tokens. Raises InputError if it holds tokens of another number of sequences."""
        if self.length and batch != self.batch:
            raise InputError(f"the cache holds {self.batch} rows and {batch} were given: call reset() first")
        if batch == self.batch and needed <= self.capacity:
            return
        capacity = grown(self.capacity if batch == self.batch else 0, needed, self._context_length)
        arrays = self.empty(batch, capacity)
        if self.length:
            for old, new in zip(self.arrays, arrays, strict=True):
                new[:, :, : self.length] = old[:, :, : self.length]
        self.arrays, self.batch, self.capacity = arrays, batch, capacity

    def empty(self, batch: int, rows: int) -> list[Rows]:
        """Zeros (B, K, rows, D) for each tensor."""
        return [np.zeros((batch, heads, rows, size), self._dtype) for heads, size in self._sizes]

    def write(self, new: Sequence[Rows], at: int, first: int, tokens: int) -> None:
        """Copies rows `first` to `first + tokens` of each of `new` (B, K, rows, D) to position `at` of the cache."""
        for array, rows in zip(self.arrays, new, strict=True):
            array[:, :, at : at + tokens] = rows[:, :, first : first + tokens]

    def trim(self, length: int) -> None:
        """Trims each sequence to its first `length` tokens."""
        if not 0 <= length <= self.length:
            raise InputError(f"the cache holds {self.length} tokens and cannot be trimmed to {length}")
        self.length = length

    def drop(self, start: int, end: int, moved: Moved) -> None:
        """See `KVCache.drop`."""
        for index, array in enumerate(self.arrays):
            array[:, :, start : start + self.length - end] = moved(index, array[:, :, end : self.length])
        self.length -= end - start

    def reset(self) -> None:
        """Forgets all tokens. The arrays stay for the next prompt."""
        self.length = 0

    def rows(self, length: int) -> list[Rows]:
        """Views of the first `length` tokens of each array, (B, K, length, D)."""
        if not 0 <= length <= self.length:
            raise InputError(f"the cache holds {self.length} tokens and cannot be trimmed to {length}")
        return [array[:, :, :length] for array in self.arrays]

    def nearest(self, length: int) -> int:
        """The largest number of tokens, at most `length`, to which each sequence can be trimmed: `length`."""
        return length

    def fill(self, rows: Sequence[Rows], length: int) -> None:
        """Replaces the content by copies of `rows`, as `rows(length)` of another cache of this graph returned them."""
        self.reset()
        self.reserve(rows[0].shape[0], length)
        self.write(rows, 0, 0, length)
        self.length = length

    def reserve(self, batch: int, tokens: int, *, ahead: bool = False) -> None:
        """Allocates room for `tokens` new tokens in each of `batch` sequences."""
        del ahead
        self.grow(batch, self.length + tokens)


class FixedKVCache(FixedRows):
    """The standard graph's cache for providers with slow shape changes: past grows only when it is full.

    Only for graphs that treat a hole as padding. It has the methods of a KVCache: a run is `reserve`, onnxruntime's
    run, `advance`; a run that fails in between leaves the cache unchanged.
    """

    evicted = 0

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
        self._columns = 0  # columns of past in the reserved run
        self._out: list[Rows] = []  # (B, K, columns + T, D): outputs of that run

    def reserve(self, batch: int, tokens: int, *, ahead: bool = False) -> None:
        """Allocates room for `tokens` new tokens in each of `batch` sequences; binds past and present."""
        del ahead
        self.grow(batch, self.length + tokens)
        # Before the first token, past is empty: it has no holes.
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
        """Appends the tokens of the run that just ended."""
        self.write(self._out, self.length, self._columns, tokens)
        self.length += tokens

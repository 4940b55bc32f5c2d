"""The KV cache: keys and values of the tokens so far, for each attention call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.contract import names
from pastkey.contract.bundle import KVGeometry, RowsGeometry, StateGeometry
from pastkey.errors import InputError
from pastkey.providers import PROVIDERS, Provider
from pastkey.values import shown

from ...providers.ort import onnxruntime
from ..binding import new_bindings
from ..shift import Moved
from .states import Arrays, States

GROWTH_STEP = 128  # smallest growth of a cache, in rows


def grown(capacity: int, needed: int, context_length: int) -> int:
    """The new capacity, in rows, of a cache that needs more.

    At least a quarter more than `capacity`, a multiple of GROWTH_STEP, and at most the context.
    """
    wanted = max(needed, capacity + capacity // 4)
    return min(-(-wanted // GROWTH_STEP) * GROWTH_STEP, context_length)


@dataclass(frozen=True)
class _Tensor:
    """A cached tensor of the graph: (B, kv_heads, P, head_size), or (B, rows, head_size) for a short convolution."""

    past: str  # input
    present: str  # output
    kv_heads: int | None  # None for a convolution
    head_size: int


class KVCache:
    """Keys and values of `length` tokens in each of `batch` sequences, bound to one graph's inputs and outputs.

    `binding` is the IOBinding of the next run; the graph binds its other inputs and outputs to it.

    Shared form (the fused graph): past and present are one buffer of `capacity` rows, and a run writes the new rows
    into it. The buffer grows in steps, since a short prompt should not allocate the whole context. A padded sequence
    holds its real tokens first, without padding.

    Concatenating form (the standard graph): a run returns new tensors, which become the next run's past.

    A run is `reserve`, onnxruntime's run, `advance`. After an exception in a method the owner drops the cache.
    """

    def __init__(
        self,
        onnx: Any,
        layers: Sequence[KVGeometry],
        *,
        shared: bool,
        context_length: int,
        provider: Provider = PROVIDERS["cpu"],
        device_id: int = 0,
        dtype: type[np.generic] = np.float32,
        rows: Sequence[RowsGeometry] = (),
        states: Sequence[StateGeometry] = (),
    ) -> None:
        """`onnx` is the onnxruntime.InferenceSession. `provider` determines the device of the tensors."""
        self.onnx = onnx
        # Tensors that a run allocates live as long as its binding (at least up to onnxruntime 1.23). The concatenating
        # form alternates two bindings, so that the last run's tensors outlive the next binding.
        # So do states, of which a run reads one copy and writes the other.
        self.states = States(states) if states else None
        self.binding, self._other_binding = new_bindings(onnx, two=not shared or bool(states))
        self._shared = shared
        self._context_length = context_length
        self._device, self._device_id = provider.device, device_id
        self._from_runs = not provider.allocates
        self._moving = False  # whether the next run moves a shared buffer from CPU memory to the device
        self._dtype = np.dtype(dtype)
        self._tensors: list[_Tensor] = []
        for i, layer in enumerate(layers):
            self._tensors += [
                _Tensor(names.past_key(i), names.present_key(i), layer.kv_heads, layer.key_head_size),
                _Tensor(names.past_value(i), names.present_value(i), layer.kv_heads, layer.value_head_size),
            ]
        assert not (shared and rows)
        self._trims = not rows  # a convolution state cannot be rolled back to an earlier token
        for i, kept in enumerate(rows):
            self._tensors.append(_Tensor(names.past_conv(i), names.present_conv(i), None, kept.size))
        self._rows = sum(kept.rows * kept.size for kept in rows)
        self._values: list[Any] = []  # one OrtValue per tensor
        # Memory of a shared buffer on the CPU, (B, K, capacity, D): keys and values of each attention call in turn.
        self.arrays: list[npt.NDArray[Any]] = []
        self._capacity = 0
        self.batch = 0  # B
        self.length = 0  # tokens per sequence, padding included

    def __del__(self) -> None:
        # The session goes last: the other order segfaults on WebGPU.
        for name in ("_values", "binding", "_other_binding", "onnx"):
            vars(self).pop(name, None)

    @property
    def capacity(self) -> int:
        """Number of rows that fit into the tensors."""
        return self._capacity if self._shared else self.length

    @property
    def nbytes(self) -> int:
        """Current size of the tensors in bytes."""
        row = sum((tensor.kv_heads or 0) * tensor.head_size for tensor in self._tensors)
        states = 0 if self.states is None else self.states.nbytes
        return self.batch * (self.capacity * row + self._rows) * self._dtype.itemsize + states

    def reserve(self, batch: int, tokens: int) -> None:
        """Allocates room for `tokens` new tokens in each of `batch` sequences and binds the changed tensors."""
        if self.length and batch != self.batch:
            raise InputError(f"the cache holds {self.batch} rows and {batch} were given: call reset() first")
        if self._shared:
            if batch != self.batch or self.length + tokens > self._capacity:
                self._grow(batch, self.length + tokens)
        else:
            if not self.length:
                self.batch = batch
                self._values = [self._place(np.zeros(self._shape(t, 0), self._dtype)) for t in self._tensors]
            for tensor, value in zip(self._tensors, self._values, strict=True):
                self.binding.bind_ortvalue_input(tensor.past, value)
                self.binding.bind_output(tensor.present, self._device, self._device_id)
        if self.states is not None:
            if not self.length:
                self.states.begin(batch)
            if not self.length or not self._shared or self._device != "cpu":  # a device copies what is bound at once
                self._bind_states()

    def columns(self, mask: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The graph's attention_mask for the `mask` (B, S): the same, since each column is a token."""
        return mask

    def advance(self, tokens: int) -> None:
        """Appends the tokens of the run that just ended."""
        if self.states is not None:
            self.states.advance(self.length)
        self.length += tokens
        if self._shared and not self._moving:
            self._swap()
            return
        # `reserve` binds these outputs before the logits, and onnxruntime keeps the order of binding.
        self._values = self.binding.get_outputs()[: len(self._tensors)]
        self._swap()
        if not self._shared:
            return
        self._moving = False
        for tensor, value in zip(self._tensors, self._values, strict=True):
            self._bind_shared(tensor, value)

    def nearest(self, length: int) -> int:
        """The largest number of tokens, at most `length`, to which each sequence can be trimmed."""
        if self.states is not None:
            return self.states.nearest(length, self.length)
        return length if self._trims or length == self.length else 0

    def trim(self, length: int) -> None:
        """Trims each sequence to its first `length` tokens."""
        self._require_trimmable(length)
        if self.states is not None and length and self.states.back(length, self.length):
            self._swap()
        if not self._shared and length < self.length:
            if not length:
                self.reset()
                return
            self._values = [self._place(np.ascontiguousarray(value.numpy()[:, :, :length])) for value in self._values]
        self.length = length

    def drop(self, start: int, end: int, moved: Moved) -> None:
        """Evicts the tokens from `start` to `end` of each sequence; later ones move up.

        `moved` transforms the moved rows of each tensor to their new positions.
        """
        if self.arrays:
            move_up(self.arrays, start, end, self.length, moved)
            self.length -= end - start
            return
        rows = self.rows(self.length)
        left = [np.concatenate([row[:, :, :start], moved(i, row[:, :, end:])], 2) for i, row in enumerate(rows)]
        self.fill(left, self.length - (end - start))

    def reset(self) -> None:
        """Forgets all tokens. A shared buffer stays for the next prompt."""
        self.length = 0
        if not self._shared:
            self._values = []
            self.binding.clear_binding_outputs()
            self._other_binding.clear_binding_outputs()

    def rows(self, length: int) -> list[npt.NDArray[Any]]:
        """The first `length` tokens of each tensor, (B, K, length, D), then whole rows of convolutions, and states.

        In CPU memory these are views of the cache.
        """
        self._require_trimmable(length)
        arrays = [value.numpy() for value in self._values]
        rows = [
            array if tensor.kv_heads is None else array[:, :, :length]
            for tensor, array in zip(self._tensors, arrays, strict=True)
        ]
        return rows if self.states is None else [*rows, *self.states.at(length, self.length)]

    def fill(self, rows: Sequence[npt.NDArray[Any]], length: int) -> None:
        """Replaces the content by copies of `rows`, as `rows(length)` of another cache of this graph returned them."""
        self.reset()
        batch = rows[0].shape[0]
        if self.states is not None:
            self.states.begin(batch)
            self.states.fill(rows[len(self._tensors) :])
            if self._shared:  # else `reserve` binds them, behind keys and values
                self._bind_states()
            rows = rows[: len(self._tensors)]
        if not self._shared:
            self._values = [self._place(np.array(array, order="C")) for array in rows]
        elif self.arrays and batch == self.batch and length <= self._capacity:
            for array, row in zip(self.arrays, rows, strict=True):
                array[:, :, :length] = row
        else:
            self._values = [onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(row)) for row in rows]
            self.batch, self.length, self._capacity = batch, length, 0
            self._grow(batch, length)
        self.batch, self.length = batch, length

    def place(self, index: int, array: npt.NDArray[Any]) -> None:
        """Moves one tensor of one sequence's shared buffer on the CPU to `array` (1, K, capacity, D)."""
        assert self._shared, "a concatenating cache has no memory of its own"
        assert (1, self.length) <= (self.batch, array.shape[2]), f"{self.length} tokens do not fit {array.shape}"
        array[:, :, : self.length] = self.arrays[index][:, :, : self.length]
        self._move(index, array)
        self._capacity = array.shape[2]

    def move_out(self) -> None:
        """Moves a shared buffer out of a slab to its own memory."""
        self._capacity = 0
        self._grow(1, max(1, self.length))

    def place_states(self, copies: tuple[Arrays, Arrays]) -> None:
        """Moves both copies of the states to other arrays on the CPU, the current one to the first."""
        if self.states is not None:
            self.states.place(copies)
            self._bind_states()

    def flip_states(self) -> None:
        """Copies the states over the other copy, which becomes the current one."""
        if self.states is not None:
            self.states.flip()
            self._swap()

    def _swap(self) -> None:
        self.binding, self._other_binding = self._other_binding, self.binding

    def _require_trimmable(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise InputError(f"the cache holds {self.length} tokens and cannot be trimmed to {shown(length)}")
        if self.nearest(length) != length:
            raise InputError(
                "this bundle keeps the last rows of convolutions or the states of recurrences, which cannot be trimmed "
                f"to {length} tokens: call reset() and give the tokens again"
            )

    def _grow(self, batch: int, needed: int) -> None:
        """Moves to larger buffers."""
        capacity = grown(self._capacity if batch == self.batch else 0, needed, self._context_length)
        if not self.length:
            self._values, self.arrays = [], []
        self.batch, self._capacity, self._moving = batch, capacity, self._from_runs
        for i, tensor in enumerate(self._tensors):  # holds only one tensor twice at a time
            array = np.zeros(self._shape(tensor, capacity), self._dtype)
            if self.length:
                array[:, :, : self.length] = self._values[i].numpy()[:, :, : self.length]
            self._move(i, array)

    def _move(self, index: int, array: npt.NDArray[Any]) -> None:
        """Makes `array`, which holds the tokens so far, the buffer of one tensor, and binds it."""
        tensor, value = self._tensors[index], self._place(array)
        self._values[index : index + 1] = [value]
        if self._device == "cpu":
            self.arrays[index : index + 1] = [array]
        if self._from_runs:
            self.binding.bind_ortvalue_input(tensor.past, value)
            self.binding.bind_output(tensor.present, self._device, self._device_id)
        else:
            self._bind_shared(tensor, value)

    def _bind_shared(self, tensor: _Tensor, value: Any) -> None:
        for binding in {self.binding, self._other_binding}:
            binding.bind_ortvalue_input(tensor.past, value)
            binding.bind_ortvalue_output(tensor.present, value)

    def _bind_states(self) -> None:
        assert self.states is not None
        self.states.bind(self.binding, self.states.now)
        if self._shared:  # else the other binding's first outputs are keys and values
            self.states.bind(self._other_binding, 1 - self.states.now)

    def _shape(self, tensor: _Tensor, rows: int) -> tuple[int, ...]:
        if tensor.kv_heads is None:
            return (self.batch, rows, tensor.head_size)
        return (self.batch, tensor.kv_heads, rows, tensor.head_size)

    def _place(self, array: npt.NDArray[Any]) -> Any:
        """An OrtValue with this content, on the device if the provider allocates there; on the CPU it shares memory."""
        return onnxruntime.OrtValue.ortvalue_from_numpy(
            array, "cpu" if self._from_runs else self._device, 0 if self._from_runs else self._device_id
        )


def move_up(arrays: Sequence[npt.NDArray[Any]], start: int, end: int, length: int, moved: Moved) -> None:
    """Writes the rows from `end` to `length` of each of `arrays` (B, K, >= length, D) from `start` on."""
    for index, array in enumerate(arrays):
        array[:, :, start : start + length - end] = moved(index, array[:, :, end:length])

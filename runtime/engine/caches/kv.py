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
from .capacity import Windows, grown
from .marks import STATE_MARKS, WINDOW_MARKS, Marks
from .states import Arrays, States


@dataclass(frozen=True)
class _Tensor:
    """A cached tensor of the graph: (B, kv_heads, P, head_size), or (B, rows, head_size) for a short convolution."""

    past: str  # input
    present: str  # output
    kv_heads: int | None  # None for a convolution
    head_size: int
    windowed: bool = False  # whether its rows can be evicted


class KVCache:
    """Keys and values of `length` tokens in each of `batch` sequences, bound to one graph's inputs and outputs.

    `binding` is the IOBinding of the next run; the graph binds its other inputs and outputs to it.

    Shared form (the fused graph): past and present are one buffer of `capacity` rows, and a run writes the new rows
    into it. The buffer grows in steps, since a short prompt should not allocate the whole context. A padded sequence
    holds its real tokens first, without padding.

    Concatenating form (the standard graph): a run returns new tensors, which become the next run's past.

    Tensors of attention calls with a window hold the last `length - evicted` tokens only, in order.

    Parts that cannot be trimmed are marked: `mark` keeps copies of the states and of the rows that the next token sees.

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
        windows: Windows | None = None,
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
        self.windows = windows
        for i, layer in enumerate(layers):
            local = windows is not None and windows.calls[i]
            self._tensors += [
                _Tensor(names.past_key(i), names.present_key(i), layer.kv_heads, layer.key_head_size, local),
                _Tensor(names.past_value(i), names.present_value(i), layer.kv_heads, layer.value_head_size, local),
            ]
        assert not (shared and rows)
        self._trims = not rows  # a convolution state cannot be rolled back to an earlier token
        for i, kept in enumerate(rows):
            self._tensors.append(_Tensor(names.past_conv(i), names.present_conv(i), None, kept.size))
        self._rows = sum(kept.rows * kept.size for kept in rows)
        self._values: list[Any] = []  # one OrtValue per tensor
        # Memory of a shared buffer on the CPU, (B, K, capacity, D): keys and values of each attention call in turn.
        self.arrays: list[npt.NDArray[Any]] = []
        self._capacities = [0, 0]  # of the plain tensors, and of the windowed ones
        self._marks = Marks(STATE_MARKS if states else WINDOW_MARKS)  # windowed rows, then states
        self.batch = 0  # B
        self.length = 0  # tokens per sequence, padding included
        self.evicted = 0  # first tokens that are no longer in the windowed tensors
        self._least = 0  # the fewest tokens for which these hold all that the next one sees

    def __del__(self) -> None:
        # The session goes last: the other order segfaults on WebGPU.
        for name in ("_values", "binding", "_other_binding", "onnx"):
            vars(self).pop(name, None)

    @property
    def nbytes(self) -> int:
        """Current size of the tensors in bytes, with the marks."""
        rows = self._capacities if self._shared else [self.length, self.length - self.evicted]
        numbers = sum((t.kv_heads or 0) * t.head_size * rows[t.windowed] for t in self._tensors) + self._rows
        states = 0 if self.states is None else self.states.nbytes
        return self.batch * numbers * self._dtype.itemsize + states + self._marks.nbytes

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens per sequence in the plain tensors, and in the windowed ones."""
        return self.length, 0 if self.windows is None else self.length - self.evicted

    def reserve(self, batch: int, tokens: int, *, ahead: bool = False) -> None:
        """Allocates room for `tokens` new tokens in each of `batch` sequences and binds the changed tensors.

        `ahead`: whether several runs append them, so that windowed tensors need less.
        """
        if self.length and batch != self.batch:
            raise InputError(f"the cache holds {self.batch} rows and {batch} were given: call reset() first")
        if self._shared:
            plain, local = self.tokens
            self._grow(batch, (plain + tokens, local if ahead or self.windows is None else local + tokens))
        else:
            if not self.length:
                self.batch = batch
                self._values = [self._place(np.zeros(self._shape(t, 0), self._dtype)) for t in self._tensors]
            for tensor, value in zip(self._tensors, self._values, strict=True):
                self.binding.bind_ortvalue_input(tensor.past, value)
                self.binding.bind_output(tensor.present, self._device, self._device_id)
        if self.states is not None:
            self.states.undo = None  # the run writes that copy, also if its results are then refused
            if not self.length:
                self.states.begin(batch)
            if not self.length or not self._shared or self._device != "cpu":  # a device copies bound arrays at once
                self._bind_states()

    def columns(self, mask: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The graph's attention_mask for the `mask` (B, S): each column is a token that is there."""
        return mask[:, self.evicted :]

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

    def evict(self, tokens: int) -> None:
        """Evicts the rows that no token sees any more, if the only sequence needs their room for `tokens` more."""
        windows, rows = self.windows, self.length - self.evicted
        if windows is None:
            return
        if self._shared and rows + tokens <= min(self._capacities[1], windows.room):
            return
        gone = rows - windows.kept
        if gone > windows.slack:
            for index in self._windowed():
                self._put(index, self._array(index)[:, :, gone:rows])
            self._begin_at(self.evicted + gone)

    def nearest(self, length: int) -> int:
        """The largest number of tokens, at most `length`, to which each sequence can be trimmed."""
        if self._can_go_back(length):
            return length
        undo = None if self.states is None else self.states.undo
        undone = undo if undo is not None and undo <= length and self._can_go_back(undo) else 0
        return max(undone, self._marks.nearest(length))

    def _can_go_back(self, length: int) -> bool:
        """Whether each sequence can be trimmed to `length` tokens without a mark."""
        if length in (0, self.length):
            return True
        undone = self.states is None or length == self.states.undo
        return undone and self._trims and length >= self._least

    def trim(self, length: int) -> None:
        """Trims each sequence to its first `length` tokens."""
        self._require_trimmable(length)
        if not length:
            self.reset()
            return
        if not self._can_go_back(length):
            self._restore(length, self._marks[length])
        elif self.states is not None and self.states.back(length):
            self._swap()
        if not self._shared and length < self.length:
            held = length, length - self.evicted
            for index, tensor in enumerate(self._tensors):
                self._put(index, self._array(index)[:, :, : held[tensor.windowed]])
        self._marks = self._marks.up_to(length)
        self.length = length

    def mark(self, *, stays: bool = False) -> None:
        """Keeps copies of the parts that cannot be trimmed. `stays`: whether later marks do not replace them."""
        if (self.windows is None and self.states is None) or self.length in self._marks:
            return
        rows = self.length - self.evicted
        first = 0 if self.windows is None else max(0, rows - self.windows.widest + 1)
        kept = [self._array(index)[:, :, first:rows] for index in self._windowed()]
        states = [] if self.states is None else self.states.copies[self.states.now]
        self._marks.add(self.length, [*kept, *states], stays=stays)

    def share_marks(self, other: KVCache, length: int) -> None:
        """Copies the marks of another cache up to `length` tokens."""
        self._marks = other._marks.up_to(length)

    def _restore(self, length: int, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Replaces the windowed rows and the states by copies of those of a mark."""
        local = self._windowed()
        for index, rows in zip(local, arrays, strict=False):
            self._put(index, rows)
        if self.windows is not None:
            self._begin_at(length - arrays[0].shape[2])
        if self.states is not None:
            self.states.fill(arrays[len(local) :])

    def _begin_at(self, evicted: int) -> None:
        """Notes the first token of the windowed tensors."""
        assert self.windows is not None
        self.evicted, self._least = evicted, evicted + self.windows.widest - 1 if evicted else 0

    def _windowed(self) -> list[int]:
        return [index for index, tensor in enumerate(self._tensors) if tensor.windowed]

    def _array(self, index: int) -> npt.NDArray[Any]:
        """A tensor's memory; a copy if it is not the CPU's."""
        return self.arrays[index] if self.arrays else self._values[index].numpy()

    def _put(self, index: int, rows: npt.NDArray[Any]) -> None:
        """Replaces the rows of a tensor from the first on, those behind left as they are in a shared buffer."""
        if self.arrays:
            self.arrays[index][:, :, : rows.shape[2]] = rows
        else:
            self._values[index] = self._place(np.ascontiguousarray(rows))

    def drop(self, start: int, end: int, moved: Moved) -> None:
        """Evicts the tokens from `start` to `end` of each sequence; later ones move up.

        `moved` transforms the moved rows of each tensor to their new positions.
        """
        lost = max(0, end - self.evicted) - max(0, start - self.evicted)
        evicted = self.evicted - (end - start) + lost
        left = list[npt.NDArray[Any]]()
        for index, tensor in enumerate(self._tensors):
            gone = self.evicted if tensor.windowed else 0
            first, rows = max(0, start - gone), self._array(index)[:, :, : self.length - gone]
            later = moved(index, rows[:, :, max(0, end - gone) :])
            if self.arrays:
                rows[:, :, first : first + later.shape[2]] = later
            else:
                left.append(np.concatenate([rows[:, :, :first], later], 2))
        length = self.length - (end - start)
        if left:
            self.fill(left, length)
        self.length, self._marks = length, self._marks.up_to(0)
        if self.windows is not None:  # where fewer tokens are left than a window sees, all of them
            self._begin_at(evicted)
            self._least = min(self._least, length)

    def reset(self) -> None:
        """Forgets all tokens. A shared buffer stays for the next prompt."""
        self.length = self.evicted = self._least = 0
        self._marks = self._marks.up_to(0)
        if not self._shared:
            self._values = []
            self.binding.clear_binding_outputs()
            self._other_binding.clear_binding_outputs()

    def rows(self, length: int) -> list[npt.NDArray[Any]]:
        """The first `length` tokens of each tensor, (B, K, length, D), then whole rows of convolutions, and states.

        Of windowed tensors those that are there. In CPU memory these are views of the cache.
        """
        self._require_trimmable(length)
        marked = [] if self._can_go_back(length) else self._marks[length]
        local, held = self._windowed(), (length, length - self.evicted)
        arrays = [value.numpy() for value in self._values]
        rows = [
            array if tensor.kv_heads is None else array[:, :, : held[tensor.windowed]]
            for tensor, array in zip(self._tensors, arrays, strict=True)
        ]
        for index, array in zip(local, marked, strict=False):
            rows[index] = array
        if self.states is not None:
            rows += marked[len(local) :] or self.states.at(length, self.length)
        return rows

    def fill(self, rows: Sequence[npt.NDArray[Any]], length: int) -> None:
        """Replaces the content by copies of `rows`, as `rows(length)` of another cache of this graph returned them."""
        self.reset()
        batch, local = rows[0].shape[0], self._windowed()
        if self.states is not None:
            self.states.begin(batch)
            self.states.fill(rows[len(self._tensors) :])
            if self._shared:  # else `reserve` binds them, behind keys and values
                self._bind_states()
            rows = rows[: len(self._tensors)]
        held = length, rows[local[0]].shape[2] if local else 0
        if not self._shared:
            self._values = [self._place(np.array(array, order="C")) for array in rows]
        elif self._device == "cpu" and not self._from_runs:
            self._grow(batch, held)
            for index, array in enumerate(rows):
                self._put(index, array)
        else:
            self._values = [onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(row)) for row in rows]
            self.batch, self.length, self._capacities = batch, length, [0, 0]
            self._grow(batch, held)
        self.batch, self.length = batch, length
        if local:
            self._begin_at(length - held[1])

    def place(self, index: int, array: npt.NDArray[Any]) -> None:
        """Moves one tensor of one sequence's shared buffer on the CPU to `array` (1, K, capacity, D)."""
        assert self._shared, "a concatenating cache has no own memory"
        windowed = self._tensors[index].windowed
        rows = self.tokens[windowed]
        assert (1, rows) <= (self.batch, array.shape[2]), f"{rows} tokens do not fit {array.shape}"
        array[:, :, :rows] = self.arrays[index][:, :, :rows]
        self._move(index, array)
        self._capacities[windowed] = array.shape[2]

    def move_out(self) -> None:
        """Moves a shared buffer out of a slab to its own memory."""
        self._capacities = [0, 0]
        self._grow(1, (max(1, self.length), self.tokens[1]))

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
                f"the cache of {self.length} tokens cannot be trimmed to {length}: it keeps the last rows of "
                "convolutions, the states of recurrences, or the tokens that a sliding window sees; call reset() and "
                "give the tokens again"
            )

    def _grow(self, batch: int, needed: tuple[int, int]) -> None:
        """Moves the plain tensors, or the windowed ones, to larger buffers if they need more rows."""
        same = batch == self.batch and bool(self._values)
        before = self._capacities if same else [0, 0]
        needed = needed[0], max(1, needed[1])
        grows = [need > room for need, room in zip(needed, before, strict=True)]
        if not any(grows):
            return
        if not self.length and (all(grows) or self.windows is None):
            self._values, self.arrays = [], []
        self.batch, self._moving = batch, self._from_runs
        self._capacities = [
            grown(before[0], needed[0], self._context_length) if needed[0] > before[0] else before[0],
            max(before[1], grown(0, needed[1], self._context_length)),
        ]
        for i, tensor in enumerate(self._tensors):  # holds only one tensor twice at a time
            if not grows[tensor.windowed]:
                continue
            array = np.zeros(self._shape(tensor, self._capacities[tensor.windowed]), self._dtype)
            if self.length:
                rows = self.tokens[tensor.windowed]
                array[:, :, :rows] = self._values[i].numpy()[:, :, :rows]
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

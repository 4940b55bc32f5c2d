"""Rows of several engines in one memory, so that one run decodes a token of each.

GroupQueryAttention takes a shared buffer (B, K, capacity, D) whose rows have lengths of their own. The buffers of the
engines that are in a slab are its rows: row i alone is the contiguous part [i : i + 1], through which its engine runs
what it runs alone, and the first n rows together are what a run of all goes through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.contract import names

from ...providers.ort import onnxruntime
from ..binding import Binding
from ..decoder_graph import DecoderGraph, Ids, Logits
from ..engine import Engine
from .int8_kv import CachePair
from .kv import GROWTH_STEP, KVCache

_FIRST_ROWS = 4  # room at first; then twice as much each time


class Slab:
    """The memory of up to `most` engines over one graph, which must have `batches`.

    Attributes:
        members: The engines, by row.
        most: As many there may be.
    """

    def __init__(self, graph: DecoderGraph, most: int) -> None:
        assert graph.batches
        self.onnx = graph.onnx
        self.binding = Binding(graph.onnx)
        self.members: list[Engine] = []
        self._graph, self.most = graph, most
        self._arrays: list[npt.NDArray[Any]] = []  # (rows, K, capacity, D), keys and values of each call in turn
        self._rows = self._capacity = 0
        self._bound = 0  # rows that the binding is of
        layers = graph.manifest.layers
        sizes = [(layer.kv_heads, size) for layer in layers for size in (layer.key_head_size, layer.value_head_size)]
        self._sizes = sizes  # K, D
        self._past = [name(i) for i in range(len(layers)) for name in (names.past_key, names.past_value)]
        self._present = [name(i) for i in range(len(layers)) for name in (names.present_key, names.present_value)]

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays take where all of them are used; the system hands out what is written."""
        return sum(array.nbytes for array in self._arrays)

    def columns(self, mask: Ids) -> Ids:
        """The graph's attention_mask of the `mask` (B, S)."""
        return mask

    def decode(self, engines: Sequence[Engine], tokens: Sequence[int]) -> list[Logits]:
        """Appends a token to each of several engines in one run; returns the logits (V,) of each, in their order.

        They stand in arrays that the next run may write into.
        Those that are not in the slab yet move in. The caller sees to it that there is room (`has_room`) and that the
        logits are finite. An exception drops the caches of all engines here, and they leave the slab.
        """
        with self._changing(engines):
            for engine in engines:
                engine.leave_window(1)
                self.join(engine)
            return self._decode(engines, tokens)

    @contextlib.contextmanager
    def _changing(self, engines: Sequence[Engine]) -> Iterator[None]:
        """Drops the caches of `engines` and of all members where an exception comes of the block."""
        try:
            yield
        except BaseException:
            for engine in (*self.members, *engines):
                engine.drop_cache()
            self._forget()
            raise

    def _decode(self, engines: Sequence[Engine], tokens: Sequence[int]) -> list[Logits]:
        place = {id(engine): row for row, engine in enumerate(self.members)}
        rows = [place[id(engine)] for engine in engines]
        count = max(rows) + 1
        self._make_room(self._rows, max(_cache(member).length for member in self.members[:count]) + 1)
        self._bind(count)
        # A row that nobody wants now writes the place behind its last token, which is written again when it goes on.
        ids = np.zeros((count, 1), np.int64)
        ids[rows, 0] = tokens
        lengths = np.array([_cache(member).length for member in self.members[:count]], np.int64)
        logits = self._graph.run(self, ids, lengths[:, None], lengths + 1, int(lengths.max()) + 1, 1)
        for engine, token in zip(engines, tokens, strict=True):
            _cache(engine).advance(1)
            engine.note_batched(token)
        return [logits[row, 0] for row in rows]

    def has_room(self, engine: Engine) -> bool:
        """Whether an engine is in it, or may move in."""
        return len(self.members) < self.most or self.holds(engine)

    def holds(self, engine: Engine) -> bool:
        """Whether an engine is in it."""
        return any(member is engine for member in self.members)

    def join(self, engine: Engine) -> None:
        """Moves an engine in, unless it is there with all its buffers."""
        cache = _cache(engine)
        row = next((row for row, member in enumerate(self.members) if member is engine), None)
        if row is not None:
            if not self._is_home(engine):
                self._make_room(self._rows, cache.length + 1)
                self._settle(row)
            return
        assert len(self.members) < self.most, "the caller looks whether there is room"
        self._make_room(len(self.members) + 1, cache.length + 1)
        self.members.append(engine)
        self._settle(len(self.members) - 1)

    def remove(self, engine: Engine, *, keep: bool = True) -> None:
        """Moves an engine out, to memory of its own; with `keep=False` its cache is dropped."""
        row = next((row for row, member in enumerate(self.members) if member is engine), None)
        if row is None:
            return
        with self._changing([engine]):
            last = self.members.pop()
            if not keep:
                engine.drop_cache()
            elif self._is_home(engine):
                _cache(engine).move_out()
            if last is not engine:
                self.members[row] = last
                if self._is_home(last):
                    self._settle(row)
        if not self.members:
            self._forget()

    def _forget(self) -> None:
        """Lets go of all members and of the memory."""
        self.members = []
        self._arrays, self._rows, self._capacity, self._bound = [], 0, 0, 0
        self.binding = Binding(self.onnx)

    def _is_home(self, engine: Engine) -> bool:
        """Whether a member's buffers are here: it may have outgrown its row in a run of its own."""
        arrays = _cache(engine).arrays
        return bool(arrays) and arrays[0].base is self._arrays[0]

    def _settle(self, row: int) -> None:
        """Moves a member's buffers to its row."""
        for index, array in enumerate(self._arrays):
            _cache(self.members[row]).place(index, array[row : row + 1])

    def _make_room(self, rows: int, needed: int) -> None:
        """For so many rows of `needed` tokens each: moves everything, tensor by tensor, where there is not."""
        if rows <= self._rows and needed <= self._capacity:
            return
        if rows > self._rows:
            self._rows = min(self.most, max(rows, _FIRST_ROWS, 2 * self._rows))
        if needed > self._capacity:
            wanted = max(needed, self._capacity + self._capacity // 4)
            context = self._graph.manifest.context_length
            self._capacity = min(-(-wanted // GROWTH_STEP) * GROWTH_STEP, context)
        before: list[npt.NDArray[Any] | None] = [*self._arrays] or [None] * len(self._sizes)
        self._arrays, self._bound = [], 0
        for index, (heads, size) in enumerate(self._sizes):
            grown = np.zeros((self._rows, heads, self._capacity, size), np.float32)
            for row, member in enumerate(self.members):
                if _cache(member).arrays[index].base is before[index]:  # else it outgrew its row, and comes back later
                    _cache(member).place(index, grown[row : row + 1])
            before[index] = None
            self._arrays.append(grown)

    def _bind(self, count: int) -> None:
        if self._bound == count:
            return
        for past, present, array in zip(self._past, self._present, self._arrays, strict=True):
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array[:count])
            self.binding.bind_ortvalue_input(past, value)
            self.binding.bind_ortvalue_output(present, value)
        self._bound = count


def _cache(engine: Engine) -> KVCache:
    assert isinstance(engine.cache, CachePair)
    assert isinstance(engine.cache.float32, KVCache)
    return engine.cache.float32

"""A slab holds the KV caches of several engines in one buffer, so that one batched run decodes a token of each.

GroupQueryAttention reads a shared buffer (B, K, capacity, D) with a length per row. Each engine in a slab owns one row:
its own runs use the contiguous part [i : i + 1], and batched runs use the first n rows together. So it is with states,
of which there are two copies: a run reads one and writes the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.contract import names

from ...providers.ort import onnxruntime
from ..binding import new_bindings
from ..decoder_graph import DecoderGraph, Ids, Logits
from ..engine import Engine
from .capacity import grown
from .kv import KVCache
from .states import States

_FIRST_ROWS = 4  # initial number of rows; it doubles at each growth


class Slab:
    """The cache memory of up to `most` engines over one graph, which must have `batches`.

    Attributes:
        members: The engines, by row.
        idle: Engine -> steps since its last token.
        most: Largest number of engines.
        finite: Whether all logits of the last run were.
    """

    def __init__(self, graph: DecoderGraph, most: int) -> None:
        assert graph.batches
        self.onnx = graph.onnx
        self.binding, self._other_binding = new_bindings(graph.onnx, two=bool(graph.manifest.states))
        self.members: list[Engine] = []
        self.idle: dict[Engine, int] = {}
        self._graph, self.most = graph, most
        self.finite = True
        self._arrays: list[npt.NDArray[Any]] = []  # (rows, K, capacity, D), keys and values of each call in turn
        self._rows = self._capacity = 0
        self.evicted = np.zeros(0, np.int32)  # of each of the rows of a run
        self._bound = 0  # number of bound rows
        layers = graph.manifest.layers
        local = [False] * len(layers) if graph.windows is None else graph.windows.calls
        self._sizes = [  # K, D, and whether rows are evicted
            (layer.kv_heads, size, one)
            for layer, one in zip(layers, local, strict=True)
            for size in (layer.key_head_size, layer.value_head_size)
        ]
        self._past = [name(i) for i in range(len(layers)) for name in (names.past_key, names.past_value)]
        self._present = [name(i) for i in range(len(layers)) for name in (names.present_key, names.present_value)]
        self._states = States(graph.manifest.states)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, allocated lazily by the system as rows are written."""
        return sum(array.nbytes for array in self._arrays) + self._states.nbytes

    def columns(self, mask: Ids) -> Ids:
        """The graph's attention_mask for the `mask` (B, S)."""
        return mask

    def decode(self, engines: Sequence[Engine], tokens: Sequence[int]) -> list[Logits]:
        """Appends a token to each of several engines in one run; returns the logits (V,) of each, in their order.

        The next run may overwrite the returned arrays. Engines outside the slab move in. The caller checks that there
        is room and that the logits are finite. An exception drops the caches of all engines in the slab and empties it.
        """
        with self._changing(engines):
            for engine in engines:
                self.join(engine)
            return self._decode(engines, tokens)

    @contextlib.contextmanager
    def _changing(self, engines: Sequence[Engine]) -> Iterator[None]:
        """Drops the caches of `engines` and of all members if the block raises."""
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
        for member in self.members[:count]:
            _cache(member).evict(1)
        self._make_room(self._rows, max(_cache(member).length for member in self.members[:count]) + 1)
        self._bind(count)
        self._align(count)
        # An idle row computes token 0 behind its last token; its own next token overwrites that position, and its state
        # is read from the other copy.
        ids = np.zeros((count, 1), np.int64)
        ids[rows, 0] = tokens
        lengths = np.array([_cache(member).length for member in self.members[:count]], np.int64)
        self.evicted = np.array([_cache(member).evicted for member in self.members[:count]], np.int32)
        logits = self._graph.run(self, ids, lengths[:, None], lengths + 1, int(lengths.max()) + 1, 1)
        for engine, token in zip(engines, tokens, strict=True):
            _cache(engine).advance(1)
            engine.note_batched(token)
        self._states.now = 1 - self._states.now
        self.binding, self._other_binding = self._other_binding, self.binding
        self._align(count)
        self.finite = self._graph.all_finite(logits)
        return [logits[row, 0] for row in rows]

    def holds(self, engine: Engine) -> bool:
        """Whether an engine is in the slab."""
        return self._row_of(engine) is not None

    def _row_of(self, engine: Engine) -> int | None:
        return next((row for row, member in enumerate(self.members) if member is engine), None)

    def join(self, engine: Engine) -> None:
        """Moves an engine in, unless all its buffers are in the slab already."""
        cache = _cache(engine)
        row = self._row_of(engine)
        if row is not None:
            if not all(self._at_home(engine)):
                cache.evict(1)
                self._make_room(self._rows, cache.length + 1)
                self._settle(row)
            return
        assert len(self.members) < self.most, "the caller looks whether there is room"
        cache.evict(1)
        self._make_room(len(self.members) + 1, cache.length + 1)
        self.members.append(engine)
        self._settle(len(self.members) - 1)
        self._settle_states(len(self.members) - 1)

    def remove(self, engine: Engine, *, keep: bool = True) -> None:
        """Moves an engine out to its own memory; `keep=False` drops its cache."""
        row = self._row_of(engine)
        if row is None:
            return
        with self._changing([engine]):
            last = self.members.pop()
            self.idle.pop(engine, None)
            if not keep:
                engine.drop_cache()
            else:
                if any(self._at_home(engine)):
                    _cache(engine).move_out()
                _cache(engine).place_states((self._states.zeros(1), self._states.zeros(1)))
            if last is not engine:
                self.members[row] = last
                if any(self._at_home(last)):
                    self._settle(row)
                self._settle_states(row)
        if not self.members:
            self._forget()

    def _forget(self) -> None:
        """Releases all members and the memory."""
        self.members, self.idle = [], {}
        self._arrays, self._rows, self._capacity, self._bound = [], 0, 0, 0
        self._states = States(self._graph.manifest.states)
        self.binding, self._other_binding = new_bindings(self.onnx, two=bool(self._graph.manifest.states))

    def _at_home(self, engine: Engine) -> list[bool]:
        """Whether each of a member's buffers is in the slab. A separate run may have outgrown its row."""
        return [mine.base is array for mine, array in zip(_cache(engine).arrays, self._arrays, strict=False)] or [False]

    def _settle(self, row: int) -> None:
        """Moves a member's buffers to its row."""
        for index, array in enumerate(self._arrays):
            _cache(self.members[row]).place(index, array[row : row + 1])

    def _settle_states(self, row: int) -> None:
        """Moves both copies of a member's states to its row, the current one to that which the next run reads."""
        now, copies = self._states.now, self._states.copies
        first, second = ([array[row : row + 1] for array in copies[which]] for which in (now, 1 - now))
        _cache(self.members[row]).place_states((first, second))

    def _align(self, count: int) -> None:
        """Copies the states of those of the first `count` rows that are not in the copy which the next run reads."""
        for member in self.members[:count] if self._graph.manifest.states else ():
            states = _cache(member).states
            assert states is not None
            if states.copies[states.now][0].base is not self._states.copies[self._states.now][0]:
                _cache(member).flip_states()

    def _make_room(self, rows: int, needed: int) -> None:
        """Grows to `rows` rows of `needed` tokens each, if needed: moves all caches, tensor by tensor."""
        if rows <= self._rows and needed <= self._capacity:
            return
        if rows > self._rows:
            self._rows = min(self.most, max(rows, _FIRST_ROWS, 2 * self._rows))
            self._states.begin(self._rows)
            for row in range(len(self.members)):
                self._settle_states(row)
        if needed > self._capacity:
            self._capacity = grown(self._capacity, needed, self._graph.manifest.context_length)
        before: list[npt.NDArray[Any] | None] = [*self._arrays] or [None] * len(self._sizes)
        self._arrays, self._bound = [], 0
        for index, (heads, size, local) in enumerate(self._sizes):
            room = self._graph.window_rows if local else self._capacity
            larger = np.zeros((self._rows, heads, room, size), self._graph.cache_dtype)
            for row, member in enumerate(self.members):
                if _cache(member).arrays[index].base is before[index]:  # else it outgrew its row and returns later
                    _cache(member).place(index, larger[row : row + 1])
            before[index] = None
            self._arrays.append(larger)

    def _bind(self, count: int) -> None:
        if self._bound == count:
            return
        for past, present, array in zip(self._past, self._present, self._arrays, strict=True):
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array[:count])
            for binding in {self.binding, self._other_binding}:
                binding.bind_ortvalue_input(past, value)
                binding.bind_ortvalue_output(present, value)
        for binding, read in ((self.binding, self._states.now), (self._other_binding, 1 - self._states.now)):
            self._states.bind(binding, read, count)
        self._bound = count


def _cache(engine: Engine) -> KVCache:
    assert isinstance(engine.cache, KVCache)
    return engine.cache

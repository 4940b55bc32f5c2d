"""Runs a static bundle: one sequence, by a graph of one new token and a graph of a chunk, over the same KV cache.

Every tensor has a fixed size. On the CPU all are bound once, and a run changes their content. A prefill runs the
chunk's graph; its last run is filled with tokens that no token sees and whose rows are discarded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.contract import names
from pastkey.contract.bundle import Manifest
from pastkey.errors import InputError, IntegrityError
from pastkey.files.reading import reading

from ...providers.ort import onnxruntime
from ...providers.placement import CPU
from ..embedding import EmbeddingRows
from .fixed import FixedRows, Rows

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


class StaticGraphs(FixedRows):
    """The KV cache of a static bundle and the runs over it.

    A run is `reserve`, `run`, `advance`. Without `advance` the cache stays unchanged.

    Attributes:
        onnx: The onnxruntime.InferenceSession of the chunk's graph.
        watch: Called after each run with its T, the cached tokens before it and its input arrays, which the next run
            overwrites.
    """

    def __init__(self, decode: Any, prefill: Any, manifest: Manifest, folder: Path) -> None:
        """`decode` and `prefill` are sessions, the same if a chunk is one token. `folder` holds the graphs."""
        super().__init__(manifest.layers, context_length=manifest.context_length)
        assert manifest.static is not None
        self.onnx = prefill
        self.watch: Callable[[int, int, Mapping[str, Rows]], None] | None = None
        self._context = manifest.context_length
        self._decode = _Graph(decode, self, manifest, 1, folder)
        self._prefill = (
            self._decode if prefill is decode else _Graph(prefill, self, manifest, manifest.static.chunk, folder)
        )

    def reserve(self, batch: int, tokens: int, *, ahead: bool = False) -> None:
        """Allocates the arrays for the whole context. Raises InputError for more than one sequence."""
        del tokens, ahead
        if batch != 1:
            raise InputError(
                f"this bundle's static graph reads one row at a time, not {batch}: give each row separately, or "
                "export with --graph standard"
            )
        if not self.capacity:
            self.grow(1, self._context)

    def run(self, ids: Ids, keep: int) -> Logits:
        """Runs the tokens `ids` (T,) behind the cached ones. Returns the logits (1, keep, V) of the last ones."""
        kept: list[Logits] = []
        done = 0
        while done < ids.size:
            graph = self._decode if ids.size - done == 1 else self._prefill
            part = ids[done : done + graph.tokens]
            logits = graph.run(part, self.length + done)
            if self.watch is not None:
                self.watch(graph.tokens, self.length + done, graph.inputs())
            self.write(graph.new, self.length + done, 0, part.size)
            done += part.size
            wanted = min(part.size, keep - (ids.size - done))
            if wanted > 0:
                kept.append(logits[part.size - wanted : part.size].copy())
        return np.concatenate(kept)[None]

    def advance(self, tokens: int) -> None:
        """Appends the tokens of the run that just ended."""
        self.length += tokens


class _Graph:
    """A graph of T new tokens with its bound arrays."""

    def __init__(self, onnx: Any, rows: FixedRows, manifest: Manifest, tokens: int, folder: Path) -> None:
        static = manifest.static
        assert static is not None
        self.tokens = tokens  # T
        self.new = rows.empty(1, tokens)  # (1, K, T, D)
        self._onnx, self._rows = onnx, rows
        self._context, self._masked = manifest.context_length, static.masked
        self._logits = np.zeros((1, tokens, manifest.vocab_size), np.float32)
        has = {value.name for value in onnx.get_inputs()}
        self._ids = {
            name: np.zeros((1, tokens), np.int32) for name in (names.INPUT_IDS, names.POSITION_IDS) if name in has
        }
        shape = (1, 1, tokens, manifest.context_length + tokens)
        self._masks = {
            window: np.zeros(shape, np.float32) for window in static.windows if names.static_mask(window) in has
        }
        self._tables = _tables(onnx, folder, manifest)
        self._binding: Any = None
        # A provider with its own memory copies an array when it is bound.
        self._copies = onnx.get_providers()[0] != CPU

    def __del__(self) -> None:
        # The session goes last: the other order segfaults on WebGPU.
        for name in ("_binding", "_onnx"):
            vars(self).pop(name, None)

    def run(self, ids: Ids, start: int) -> Logits:
        """Runs `ids` (up to T,) at position `start`. Returns logits (T, V), valid for the first `ids.size` rows."""
        tokens = np.zeros(self.tokens, np.int64)
        tokens[: ids.size] = ids
        positions = np.minimum(np.arange(start, start + self.tokens), self._context - 1)
        columns = {names.INPUT_IDS: tokens, names.POSITION_IDS: positions}
        for name, array in self._ids.items():
            array[0] = columns[name]
        for window, mask in self._masks.items():
            seen = visible_columns(start, self.tokens, self._context, window)
            mask[0, 0] = np.where(seen, np.float32(0), np.float32(self._masked))
        for table in self._tables:
            table.fill(columns[table.of])
        if self._binding is None or self._copies:
            self._bind()
        self._onnx.run_with_iobinding(self._binding)
        logits: Logits = self._logits[0]
        return logits

    def inputs(self) -> dict[str, Rows]:
        """The arrays bound to the graph's inputs, by name."""
        inputs: dict[str, Rows] = {**self._ids}
        inputs |= {names.static_mask(window): mask for window, mask in self._masks.items()}
        inputs |= {table.name: table.array for table in self._tables}
        return inputs | dict(zip(self._rows.past, self._rows.arrays, strict=True))

    def _bind(self) -> None:
        binding, value = self._onnx.io_binding(), onnxruntime.OrtValue.ortvalue_from_numpy
        for name, array in self.inputs().items():
            binding.bind_ortvalue_input(name, value(array))
        for name, array in [(names.LOGITS, self._logits), *zip(self._rows.present, self.new, strict=True)]:
            binding.bind_ortvalue_output(name, value(array))
        self._binding = binding


class _Table:
    """A graph input whose rows the host reads from a table, by token id or by position."""

    def __init__(
        self, name: str, place: dict[str, Any], folder: Path, shape: tuple[int, ...], rows_needed: int
    ) -> None:
        self.name, self.of, self._axis = name, str(place["of"]), int(place["axis"])
        self.array = np.zeros(shape, np.float32)
        self._rows = EmbeddingRows(folder, json.dumps(place), np.float32)
        row = [*shape[: self._axis], *shape[self._axis + 1 :]]
        found, expected = place["shape"], [rows_needed, *row]
        if found[0] < rows_needed or found[1:] != row:
            raise IntegrityError(
                f"the table of the input {name!r} is {tuple(found)} and {tuple(expected)} is needed: export it again"
            )

    def fill(self, column: Ids) -> None:
        """Fills the input with the table's rows of `column` (T,)."""
        self.array[...] = np.moveaxis(self._rows[column], 0, self._axis)


def _tables(onnx: Any, folder: Path, manifest: Manifest) -> list[_Table]:
    """The tables that the graph's metadata lists. Raises IntegrityError if one is missing."""
    needed = {names.INPUT_IDS: manifest.vocab_size, names.POSITION_IDS: manifest.context_length}
    shapes = {value.name: tuple(value.shape) for value in onnx.get_inputs()}
    with reading(folder, "the graphs of a bundle"):
        stored = json.loads(onnx.get_modelmeta().custom_metadata_map.get(names.TABLES, "{}"))
        return [_Table(name, place, folder, shapes[name], needed[place["of"]]) for name, place in stored.items()]


def visible_columns(length: int, tokens: int, past: int, window: int = 0) -> npt.NDArray[np.bool_]:
    """The columns (T, P + T) that each of T new tokens sees, if the first `length` of P past rows are real.

    `window`: size of the sliding window, including the token itself; 0 for none.
    """
    position = np.concatenate([np.arange(past), np.arange(length, length + tokens)])
    real = np.concatenate([np.arange(past) < length, np.ones(tokens, bool)])
    distance = position[past:, None] - position
    seen: npt.NDArray[np.bool_] = real & (distance >= 0) & (distance < (window or np.inf))
    return seen

"""Reads single rows of a quantized embedding from the weights file.

A memory-mapped table would load the neighbours of every row, most of the table after a page of text. The peak of
SmolLM2-135M in int8 over 512 + 128 tokens is 302 MiB, 322 with a mapped table, and 328 with one initializer shared with
the output head (onnxruntime 1.32, two threads, with or without the file in the page cache). These figures are from a
separate run: only their differences count. benchmarks/results.md compares the peak with other engines.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.errors import IntegrityError, PastkeyError, first_line
from pastkey.files.reading import require_regular
from pastkey.values import shown


class EmbeddingRows:
    """A table (V, ...) in a file, such as the quantized embedding's (V, blocks, block_size) uint8.

    The file stays open, as onnxruntime's mapping of it does.

    Attributes:
        row_shape: The shape of a row.
        dtype: Its type.
    """

    def __init__(self, folder: Path, place: str, dtype: type[np.generic] = np.uint8) -> None:
        """`place` is JSON of the graph's metadata: the file's name in `folder`, the offset in bytes, and the shape.

        Raises IntegrityError if it does not fit the file.
        """
        try:
            found = json.loads(place)
            path = folder / Path(found["file"]).name
            self._offset, shape = int(found["offset"]), tuple(map(int, found["shape"]))
            self._vocab_size, self.row_shape = shape[0], shape[1:]
            self.dtype = dtype
            self._row_bytes = math.prod(self.row_shape) * np.dtype(dtype).itemsize
            end = self._offset + self._vocab_size * self._row_bytes
            if self._offset < 0 or min(shape) < 1 or end > require_regular(path).st_size:
                raise ValueError(f"{shown(path.name)} has no bytes {shown(self._offset)} to {shown(end)}")
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except (LookupError, TypeError, ValueError, OSError, ArithmeticError, RecursionError, PastkeyError) as error:
            raise IntegrityError(
                f"a graph in {folder} does not say where its embedding is: {first_line(error)}"
            ) from None
        weakref.finalize(self, os.close, self._file)

    def __getitem__(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """The rows (B, T, ...) of `ids` (B, T), each from 0 to V - 1."""
        rows = np.empty((*ids.shape, *self.row_shape), self.dtype)
        self.fill(ids, rows.reshape(-1).data)
        return rows

    def fill(self, ids: npt.NDArray[np.int64] | int, rows: memoryview) -> None:
        """Reads the rows of `ids` (B, T), or of one, into `rows` (B * T * ...)."""
        size, content = self._row_bytes, rows.cast("B")
        for place, token in enumerate([ids] if isinstance(ids, int) else ids.ravel().tolist()):
            if not 0 <= token < self._vocab_size:
                raise IntegrityError(
                    f"the embedding has {self._vocab_size} rows, and none for the token id {token}: the graph was "
                    "altered, copy the bundle again"
                )
            row = content[place * size : (place + 1) * size]
            if _read_into(self._file, [row], self._offset + token * size) != size:
                raise IntegrityError("the weights file was cut short while it was in use: copy it again")


def _seek_and_read(file: int, rows: list[memoryview], offset: int) -> int:
    os.lseek(file, offset, os.SEEK_SET)
    content = os.read(file, len(rows[0]))
    rows[0][: len(content)] = content
    return len(content)


# preadv does not change the file position, which a forked process shares with its parent. Windows has neither.
_read_into = getattr(os, "preadv", _seek_and_read)

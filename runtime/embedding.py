"""The rows of a quantized embedding, read from the weights file one by one.

A mapped table would come into memory with the neighbours of every row, most of it after a page of text.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pastkey.errors import IntegrityError


class EmbeddingRows:
    """A table (V, blocks, block_size) uint8 in a file."""

    def __init__(self, folder: Path, place: str) -> None:
        """`place` is what the graph's metadata says: the file's name in `folder`, the offset in bytes, and the shape.

        Raises IntegrityError where that cannot be.
        """
        try:
            found = json.loads(place)
            self._path = folder / Path(found["file"]).name
            self._offset, shape = int(found["offset"]), tuple(map(int, found["shape"]))
            self._vocab_size, self._row_shape = shape[0], shape[1:]
            self._row_bytes = math.prod(self._row_shape)
            end = self._offset + self._vocab_size * self._row_bytes
            if self._offset < 0 or min(shape) < 1 or end > self._path.stat().st_size:
                raise ValueError(f"{self._path.name} has no bytes {self._offset} to {end}")
        except (LookupError, TypeError, ValueError, OSError) as error:
            raise IntegrityError(f"a graph in {folder} does not say where its embedding is: {error}") from None

    def __getitem__(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """The rows (B, T, blocks, block_size) of `ids` (B, T), each from 0 to V - 1."""
        rows = np.empty((ids.size, self._row_bytes), np.uint8)
        with self._path.open("rb", buffering=0) as file:
            for row, token in zip(rows, ids.flat, strict=True):
                file.seek(self._offset + int(token) * self._row_bytes)
                if file.readinto(row.data) != self._row_bytes:
                    raise IntegrityError(f"{self._path} was cut short while it was in use: copy it again")
        return rows.reshape(*ids.shape, *self._row_shape)

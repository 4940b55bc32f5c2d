"""Finds the matrices of a graph in the file of their source, where they are in blocks already, and uses these blocks.

A matrix is found by its numbers: each of its rows is a row of the file. So it does not matter how a family's weights
are named, which rows transformers permutes, and which matrices it joins or splits. The blocks of each row are then
compared with the row of the graph. That comes from another reading of the file: in a GGUF file by the gguf library.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...graph.blocks import Blocks
from ...source.packed.file_matrix import FileMatrix
from .blocks import join
from .workers import one_thread_each, parts_of


class Found(NamedTuple):
    """A matrix of the graph in the file."""

    form: str
    blocks: Blocks | None  # None if the file's integers cannot be kept


class SourceFile:
    """The quantized matrices of a source's file."""

    def __init__(self, matrices: Sequence[FileMatrix]) -> None:
        self._places: dict[int, dict[FileMatrix, int]] = {}  # the hash of a row -> the matrices and rows that it is in
        with one_thread_each() as pool:
            for matrix in matrices:
                every = np.arange(matrix.shape[0])
                keys = pool.map(lambda part, m=matrix, every=every: _keys(m.weights(every[part])), parts_of(len(every)))
                for row, key in enumerate(itertools.chain.from_iterable(keys)):
                    self._places.setdefault(key, {})[matrix] = row

    def find(self, weights: np.ndarray) -> Found | None:
        """Returns the matrix in the file that has these weights (N, K) float32; None if a row is not in the file."""
        with one_thread_each() as pool:
            rows = list(pool.map(lambda part: np.ascontiguousarray(weights[part]), parts_of(len(weights))))
            places = [self._places.get(key, {}) for keys in pool.map(_keys, rows) for key in keys]
        if not all(places):
            return None
        weights = np.concatenate(rows)
        del rows
        counts = Counter(matrix for place in places for matrix in place)  # rows of zeros are in several
        chosen = [max(place, key=counts.__getitem__) for place in places]
        pairs = zip(chosen, places, strict=True)
        runs = [
            (matrix, np.array([place[matrix] for _, place in run]))
            for matrix, run in itertools.groupby(pairs, operator.itemgetter(0))
        ]
        form = "+".join(dict.fromkeys(matrix.form for matrix, _ in runs))
        if any(matrix.blocks(rows[:1]) is None for matrix, rows in runs):
            return Found(form, None)
        pieces = [(matrix, rows[part]) for matrix, rows in runs for part in parts_of(len(rows))]
        ends = list(itertools.accumulate(len(rows) for _, rows in pieces))
        with one_thread_each() as pool:
            parts = list(pool.map(_same, pieces, np.split(weights, ends[:-1])))
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return None
        return Found(form, join(found) if len({part.form for part in found}) == 1 else None)


def _keys(rows: np.ndarray) -> list[int]:
    return [hash(row.tobytes()) for row in rows + np.float32(0)]  # without negative zeros


def _same(piece: tuple[FileMatrix, np.ndarray], weights: np.ndarray) -> Blocks | None:
    """Returns some rows of the file if they have these weights."""
    matrix, rows = piece
    blocks = matrix.blocks(rows)
    own = weights if blocks is None or blocks.order is None else weights[:, blocks.order]
    return blocks if blocks is not None and np.array_equal(blocks.matrix, own) else None

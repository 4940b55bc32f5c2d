"""Draws batches from a token file, which is memory-mapped: any amount of data takes no memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .token_files import DataInfo

NOT_TRAINED: Final = -100  # a target that adds nothing to the loss: `ignore_index` of torch's cross-entropy
Batch = tuple[Tensor, Tensor]  # inputs and targets, each (B, T) int64; targets are the inputs one token later


class Tokens:
    """A token file, memory-mapped."""

    def __init__(self, path: Path, info: DataInfo, context: int) -> None:
        self._tokens: NDArray[Any] = np.memmap(path, dtype=info.dtype, mode="r")
        self._info = info
        self._context = context
        self._shared = info.begin == info.end  # whether one token ends a document and begins the next
        self._order = -1, np.empty(0, np.int64)  # an epoch, and the order of the rows in it

    def draw(self, size: int, seed: int, step: int) -> Batch:
        """Returns the batch of a step: `size` windows at random, rows of examples, or all rows of a lesson.

        Windows that a document's end cuts short are padded to the longest. Every row of examples is drawn once in an
        epoch, unless sources have weights. Only (seed, step) determine the batch, so a resumed run draws the same
        batches as an uninterrupted one.
        """
        rng = np.random.default_rng([seed, step])
        if self._info.row_length is not None:
            rows = self._tokens.reshape(-1, self._info.row_length)
            return _as_batch(rows[self._rows(len(rows), size, seed, step, rng)] if self._info.masked else rows)
        if self._info.sources:
            places = self._weighted_starts(size, rng, 1)
        else:
            places = rng.integers(0, len(self._tokens) - 1, size)
        return self._padded([self._of_document(int(place)) for place in places])

    def first_prompt(self) -> list[int]:
        """Returns the tokens of the first row of examples up to the first trained one."""
        row = self._tokens[: self._info.row_length]
        return [~int(token) for token in row[: int(np.argmax(row >= 0))]]

    def _rows(self, rows: int, size: int, seed: int, step: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Returns the numbers of a step's rows."""
        length = self._info.row_length
        assert length is not None
        if self._info.sources:
            return self._weighted_starts(size, rng, length - 1) // length
        numbers = []
        for place in range(step * size, (step + 1) * size):
            epoch, number = divmod(place, rows)
            if self._order[0] != epoch:
                self._order = epoch, np.random.default_rng([seed, epoch]).permutation(rows)
            numbers.append(self._order[1][number])
        return np.array(numbers)

    def _weighted_starts(self, size: int, rng: np.random.Generator, window: int) -> NDArray[np.int64]:
        """Returns the starts of windows of `window` + 1 tokens, each of a source drawn by its weight."""
        tokens = np.array([source.tokens for source in self._info.sources])
        weights = np.array([source.weight for source in self._info.sources], float)
        drawn = rng.choice(len(tokens), size, p=weights / weights.sum())
        first = np.cumsum(tokens) - tokens
        starts: NDArray[np.int64] = first[drawn] + (rng.random(size) * (tokens[drawn] - window)).astype(np.int64)
        return starts

    def windows(self, size: int) -> Iterator[Batch]:
        """Yields every token once as a target, in batches of up to `size` windows of one document each.

        The last window of a document reaches back as far as it can, over tokens that are no targets again.
        """
        if self._info.row_length is not None:
            rows = self._tokens.reshape(-1, self._info.row_length)
            step = size if self._info.masked else len(rows)
            for first in range(0, len(rows), step):
                yield _as_batch(rows[first : first + step])
            return
        windows = self._in_documents()
        while part := [*islice(windows, size)]:
            yield self._padded(part)

    def _in_documents(self) -> Iterator[NDArray[np.int64]]:
        """Yields the windows of `windows`."""
        ends = np.flatnonzero(self._tokens == self._info.end)
        starts = ends if self._shared else np.concatenate(([0], ends + 1))
        for first, behind in pairwise([*starts.tolist(), len(self._tokens)]):
            end = min(behind + self._shared, len(self._tokens))
            for start in range(first, end - 1, self._context):
                back = max(first, min(start, end - self._context - 1))
                window = self._tokens[back : min(end, start + self._context + 1)].astype(np.int64)
                again = slice(1, start - back + 1)
                window[again] = ~window[again]
                yield window

    def _of_document(self, place: int) -> NDArray[Any]:
        """Returns up to T + 1 tokens of the document at `place`: from its beginning, if one such window has both.

        So a story is read whole, as it will be generated, and a long text from anywhere. A window never goes on into
        the next document: a model that sees two stories at a time learns much later to which of them a name belongs.
        """
        most, info = self._context + 1, self._info
        first = max(0, place - self._context + 1)
        ends = np.flatnonzero(self._tokens[first : place + most] == info.end) + first
        before = int(np.searchsorted(ends, place, side="right" if self._shared else "left"))
        end = int(ends[before]) + 1 if before < len(ends) else len(self._tokens)
        if before or first == 0:
            start = int(ends[before - 1]) + (not self._shared) if before else 0
        else:
            start = max(first, min(place, end - most))
        return self._tokens[start : min(end, start + most)]

    def _padded(self, windows: Sequence[NDArray[Any]]) -> Batch:
        """Returns windows as a batch as wide as the longest. What fills up the others is not trained."""
        rows = np.full((len(windows), max(map(len, windows))), ~self._info.end, np.int64)
        for row, window in zip(rows, windows, strict=True):
            row[: len(window)] = window
        return _as_batch(rows)


def _as_batch(rows: NDArray[Any]) -> Batch:
    """Returns inputs and targets of rows (B, T + 1) of the token file, in which ~id is a token that is not trained."""
    tokens = rows.astype(np.int64)
    inputs = np.where(tokens < 0, ~tokens, tokens)[:, :-1]
    targets = np.where(tokens < 0, NOT_TRAINED, tokens)[:, 1:]
    return torch.from_numpy(inputs), torch.from_numpy(targets)

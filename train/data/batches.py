"""Draws batches from a token file, which is memory-mapped: only the places of its documents need memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .token_files import DataInfo

NOT_TRAINED: Final = -100  # a target that adds nothing to the loss: `ignore_index` of torch's cross-entropy
_PART = 1 << 24  # tokens
Batch = tuple[Tensor, Tensor]  # inputs and targets, each (B, T) int64; targets are the inputs one token later


class Tokens:
    """A token file, memory-mapped."""

    def __init__(self, path: Path, info: DataInfo, context: int) -> None:
        self._tokens: NDArray[Any] = np.memmap(path, dtype=info.dtype, mode="r")
        self._info = info
        self._context = context
        self._order = -1, np.empty(0, np.int64)  # an epoch, and the order of the rows in it

    def draw(self, size: int, seed: int, step: int) -> Batch:
        """Returns the batch of a step: `size` windows at random, rows of examples, or all rows of a lesson.

        A window is of one document, and is padded to the longest of the batch. Every token is as likely as any other.
        Every row of examples is drawn once in an epoch, unless sources have weights. Only (seed, step) determine the
        batch, so a resumed run draws the same batches as an uninterrupted one.
        """
        rng = np.random.default_rng([seed, step])
        if self._info.row_length is not None:
            rows = self._tokens.reshape(-1, self._info.row_length)
            return _as_batch(rows[self._rows(len(rows), size, seed, step, rng)] if self._info.masked else rows)
        first, end, _ = self._documents
        return self._padded([self._window(int(first[one]), int(end[one]), rng) for one in self._drawn(size, rng)])

    def first_prompt(self) -> list[int]:
        """Returns the tokens of the first row of examples up to the first trained one."""
        row = self._tokens[: self._info.row_length]
        return [~int(token) for token in row[: int(np.argmax(row >= 0))]]

    def _rows(self, rows: int, size: int, seed: int, step: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Returns the numbers of a step's rows."""
        length = self._info.row_length
        assert length is not None
        if self._info.sources:
            of_source = np.array([source.tokens // length for source in self._info.sources])
            drawn = self._drawn_sources(size, rng)
            first: NDArray[np.int64] = np.cumsum(of_source) - of_source
            return first[drawn] + rng.integers(0, of_source[drawn])
        numbers = []
        for place in range(step * size, (step + 1) * size):
            epoch, number = divmod(place, rows)
            if self._order[0] != epoch:
                self._order = epoch, np.random.default_rng([seed, epoch]).permutation(rows)
            numbers.append(self._order[1][number])
        return np.array(numbers)

    def _drawn_sources(self, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Returns the numbers of `size` sources, drawn by their weights."""
        weights = np.array([source.weight for source in self._info.sources], float)
        return rng.choice(len(weights), size, p=weights / weights.sum())

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
        windows = self._in_order()
        while part := [*islice(windows, size)]:
            yield self._padded(part)

    def _in_order(self) -> Iterator[NDArray[np.int64]]:
        for first, end in zip(*(bounds.tolist() for bounds in self._documents[:2]), strict=True):
            for start in range(first, end - 1, self._context):
                back = max(first, min(start, end - self._context - 1))
                window = self._tokens[back : min(end, start + self._context + 1)].astype(np.int64)
                again = slice(1, start - back + 1)
                window[again] = ~window[again]
                yield window

    @functools.cached_property
    def _documents(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """First token and end of each of N documents with a target, and the sums (N + 1,) of the weights before each.

        A document begins with its BOS token. Without one it begins with the EOS token of the document before it. Its
        weight is its number of windows of T tokens, at least one.
        """
        shared = self._info.begin in (None, self._info.end)  # by two documents
        first = self._places(self._info.end if shared else self._info.begin)
        first = first if len(first) and first[0] == 0 else np.concatenate(([0], first))
        end = np.concatenate((first[1:] + shared, [len(self._tokens)]))
        real = end - first > 1
        weights = np.maximum(1, (end - first)[real] / self._context)
        return first[real], end[real], np.concatenate(([0.0], np.cumsum(weights)))

    def _places(self, token: int | None) -> NDArray[np.int64]:
        """Returns where a token is, by parts of the file."""
        parts = range(0, len(self._tokens), _PART)
        return np.concatenate([np.flatnonzero(self._tokens[part : part + _PART] == token) + part for part in parts])

    def _drawn(self, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Returns the numbers of `size` documents, drawn by their weights, and by those of their sources."""
        first, _, total = self._documents
        low, high = np.zeros(size), np.full(size, total[-1])
        if self._info.sources:
            bounds = np.cumsum([0, *(source.tokens for source in self._info.sources)])
            of_source = total[np.searchsorted(first, bounds - (self._info.begin is None))]
            drawn = self._drawn_sources(size, rng)
            low, high = of_source[drawn], of_source[drawn + 1]
        numbers: NDArray[np.int64] = np.searchsorted(total, low + rng.random(size) * (high - low), side="right") - 1
        return numbers

    def _window(self, first: int, end: int, rng: np.random.Generator) -> NDArray[Any]:
        """Returns up to T + 1 tokens of a document: from its beginning, or, of a long one, from anywhere.

        So a story is read whole, as it will be generated. A window never continues into the next document: a model that
        sees two stories at a time learns much later to which of them a name belongs.
        """
        place, most = int(rng.integers(first, end - 1)), self._context + 1
        start = first if place - first < self._context else min(place, end - most)
        return self._tokens[start : min(end, start + most)]

    def _padded(self, windows: Sequence[NDArray[Any]]) -> Batch:
        """Returns windows as a batch as wide as the longest. The padding of the others is not trained."""
        rows = np.full((len(windows), max(map(len, windows))), ~self._info.end, np.int64)
        for row, window in zip(rows, windows, strict=True):
            row[: len(window)] = window
        return _as_batch(rows)


def in_parts(batch: Batch, rows: int) -> list[Batch]:
    """Returns a batch in parts of at most `rows` rows of about one length, each as wide as its longest.

    Tokens after a row's last trained target are left out, since a decoder sees only earlier tokens.
    """
    inputs, targets = batch
    lengths = ((targets != NOT_TRAINED) * torch.arange(1, targets.shape[1] + 1)).amax(1)
    parts = lengths.argsort(stable=True).split(rows)
    widths = [max(1, int(lengths[part].max())) for part in parts]
    return [(inputs[part, :width], targets[part, :width]) for part, width in zip(parts, widths, strict=True)]


def _as_batch(rows: NDArray[Any]) -> Batch:
    """Returns inputs and targets of rows (B, T + 1) of the token file, in which ~id is a token that is not trained."""
    tokens = rows.astype(np.int64)
    inputs = np.where(tokens < 0, ~tokens, tokens)[:, :-1]
    targets = np.where(tokens < 0, NOT_TRAINED, tokens)[:, 1:]
    return torch.from_numpy(inputs), torch.from_numpy(targets)

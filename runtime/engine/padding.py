"""The padding of a KV cache that holds sequences of different lengths."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class Padding:
    """The mask (B, length) of a KV cache; None without padding, which means all ones."""

    def __init__(self) -> None:
        self.mask: Ids | None = None
        self._ones = np.ones(0, np.int64)

    def first(self, length: int) -> Ids | None:
        """The mask of the first `length` columns."""
        return None if self.mask is None or not length else self.mask[:, :length]

    def of_run(self, length: int, batch: int, tokens: int, mask: Ids | None) -> tuple[Ids, Ids]:
        """attention_mask (B, S) and position_ids (B, T) of a run: a position is the number of real tokens before it.

        `length`: cached columns. `mask`: mask of the new tokens, (B, T).
        """
        total = length + tokens
        if self.mask is None and mask is None:
            if self._ones.size < batch * total:
                self._ones = np.ones(2 * batch * total, np.int64)
            positions = np.arange(length, total, dtype=np.int64)[None]
            positions = positions if batch == 1 else positions.repeat(batch, axis=0)
            return self._ones[: batch * total].reshape(batch, total), positions
        past = np.ones((batch, length), np.int64) if self.mask is None else self.mask
        new = np.ones((batch, tokens), np.int64) if mask is None else mask
        full = np.concatenate([past, new], axis=1)
        positions = np.maximum(np.cumsum(full, axis=1) - 1, 0)[:, length:]
        return full, np.ascontiguousarray(positions)

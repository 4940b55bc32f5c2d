"""A quantized matrix of a source's file."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ...graph.blocks import Blocks


class FileMatrix(Protocol):
    """A quantized matrix (N, K) of a source's file. Arguments `rows` are (n,) integers."""

    @property
    def form(self) -> str: ...  # as people call it

    @property
    def shape(self) -> tuple[int, int]: ...  # (N, K)

    def weights(self, rows: np.ndarray) -> np.ndarray:
        """Returns float32 weights (n, K) as the source's module has them."""

    def blocks(self, rows: np.ndarray) -> Blocks | None:
        """Returns the integers of some rows with their scales, None if they are in no blocks that can be kept."""

"""What a source's file shows of a matrix that it holds quantized."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class FileMatrix(Protocol):
    """A quantized matrix (N, K) of a source's file. Arguments `rows` are (n,) integers.

    A weight is (integer - zero point) * scale, or integer * scale - offset.
    """

    @property
    def form(self) -> str: ...  # as people call it

    @property
    def kept(self) -> bool: ...  # whether its integers can be read; otherwise only its weights

    @property
    def shape(self) -> tuple[int, int]: ...  # (N, K)

    @property
    def bits(self) -> int: ...  # of the integers, 4 or 8

    @property
    def block_size(self) -> int: ...

    @property
    def order(self) -> np.ndarray | None: ...  # (K,): its integers are those of the channels order[0], order[1] ...

    def weights(self, rows: np.ndarray) -> np.ndarray:
        """Returns float32 weights (n, K) as the source's module has them."""

    def numbers(self, rows: np.ndarray) -> np.ndarray:
        """Returns integers (n, K) uint8, in `order`."""

    def scales(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns factors and codes.

        A scale is a code (n, blocks) uint8 times its factor (n, groups) float32, each of blocks / groups codes; or
        without codes a factor (n, blocks), float16 or float32.
        """

    def zeros(self, rows: np.ndarray) -> np.ndarray | None:
        """Returns zero points (n, blocks) uint8, None where they are the middle, 8 or 128."""

    def offsets(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Returns factors and codes as `scales`, None if a weight is (integer - zero point) * scale."""

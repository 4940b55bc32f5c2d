"""Matrices in blocks of small integers, as com.microsoft.MatMulNBits reads them: arrays only.

Each row of a matrix is cut into blocks of `block_size` weights that share one scale. Scales are stored in a byte each:
a whole number from 1 to 255 times one float32 of the row. They are rounded up, so that no weight is cut off.

    int8   round(w / scale) + 128 in a uint8; the scale is max |w| / 127
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

ZERO = 128
_BLOCK_SIZES = (32, 16)
_LARGEST_CODE = np.float32(255)


@dataclass(frozen=True)
class BlockQuantized:
    """A matrix (N, K) in int8 blocks."""

    data: np.ndarray  # (N, blocks, block_size) uint8, offset by 128; the last block padded with zeros
    codes: np.ndarray  # (N, blocks) uint8: the scale over the row's factor
    factors: np.ndarray  # (N, 1) float32
    columns: int  # K

    @property
    def block_size(self) -> int:
        """Weights to a scale."""
        return int(self.data.shape[2])

    @property
    def scales(self) -> np.ndarray:
        """(N, blocks) float32, as the graph computes them."""
        scales: np.ndarray = self.codes.astype(np.float32) * self.factors
        return scales


def quantize_blocks(matrix: np.ndarray, block_size: int) -> BlockQuantized:
    """Quantizes (N, K) float32 row by row. Raises ValueError on NaN or infinity."""
    if not np.isfinite(matrix).all():
        raise ValueError("NaN or infinity")
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    padded = np.zeros((rows, blocks * block_size), np.float32)
    padded[:, :columns] = matrix
    padded = padded.reshape(rows, blocks, block_size)
    codes, factors = encode_scales(np.abs(padded).max(2) / np.float32(127))
    scales = codes.astype(np.float32) * factors
    data = np.clip(np.rint(padded / scales[:, :, None]), -127, 127) + ZERO
    return BlockQuantized(data.astype(np.uint8), codes, factors, columns)


def dequantize_blocks(quantized: BlockQuantized) -> np.ndarray:
    """(N, K) float32, what the kernels compute with."""
    values: np.ndarray = (quantized.data.astype(np.float32) - ZERO) * quantized.scales[:, :, None]
    return values.reshape(len(values), -1)[:, : quantized.columns]


def choose_block_size(columns: int) -> int:
    """32 weights to a scale, or 16 where padding a row to a multiple of 32 costs more than the further scales."""
    return min(_BLOCK_SIZES, key=lambda size: -(-columns // size) * (size + 1))


def join(parts: Sequence[BlockQuantized]) -> BlockQuantized:
    """Matrices of equal K and block size below one another, as one."""
    if len(parts) == 1:
        return parts[0]
    return BlockQuantized(
        np.concatenate([part.data for part in parts]),
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.factors for part in parts]),
        parts[0].columns,
    )


def encode_scales(
    scales: np.ndarray, rounded: Callable[[np.ndarray], np.ndarray] = np.ceil
) -> tuple[np.ndarray, np.ndarray]:
    """Bytes (N, blocks) and float32 (N, 1) whose product is no smaller than the scales (N, blocks).

    With np.rint it is the nearest to them instead.
    """
    factors = scales.max(1, keepdims=True) / _LARGEST_CODE
    # A row of zeros, or of numbers too small to divide by, is stored as zeros.
    factors[factors < np.finfo(np.float32).tiny] = 1
    codes = np.clip(rounded(scales / factors), 1, _LARGEST_CODE)
    return codes.astype(np.uint8), factors.astype(np.float32)

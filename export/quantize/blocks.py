"""Matrices in blocks of small integers, as com.microsoft.MatMulNBits reads them: arrays only.

Each row of a matrix is cut into blocks of `block_size` weights that share one scale. Scales are double quantized, as in
QLoRA and k-quants: a scale code of a byte, from 1 to 255, times one float32 row scale. They are rounded up, so that no
weight is cut off.

    int8   round(w / scale) + 128 in a uint8; the scale is max |w| / 127
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

ZERO = 128  # what an int8 weight of 0 is stored as
_BLOCK_SIZES = (32, 16)
_LARGEST_CODE = np.float32(255)


@dataclass(frozen=True)
class Int8Blocks:
    """A matrix (N, K) in int8 blocks."""

    data: np.ndarray  # (N, blocks, block_size) uint8, offset by 128; the last block padded with zeros
    scale_codes: np.ndarray  # (N, blocks) uint8: the scale over the row scale
    row_scales: np.ndarray  # (N, 1) float32
    columns: int  # K

    @property
    def block_size(self) -> int:
        """Weights to a scale."""
        return int(self.data.shape[2])

    @property
    def scales(self) -> np.ndarray:
        """(N, blocks) float32, as the graph computes them."""
        scales: np.ndarray = self.scale_codes.astype(np.float32) * self.row_scales
        return scales


def quantize_blocks(matrix: np.ndarray, block_size: int) -> Int8Blocks:
    """Quantizes (N, K) float32 row by row. Raises ValueError on NaN or infinity."""
    if not np.isfinite(matrix).all():
        raise ValueError("NaN or infinity")
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    padded = np.zeros((rows, blocks * block_size), np.float32)
    padded[:, :columns] = matrix
    padded = padded.reshape(rows, blocks, block_size)
    scale_codes, row_scales = encode_scales(np.abs(padded).max(2) / np.float32(127))
    scales = scale_codes.astype(np.float32) * row_scales
    data = np.clip(np.rint(padded / scales[:, :, None]), -127, 127) + ZERO
    return Int8Blocks(data.astype(np.uint8), scale_codes, row_scales, columns)


def dequantize_blocks(quantized: Int8Blocks) -> np.ndarray:
    """(N, K) float32, what the kernels compute with."""
    values: np.ndarray = (quantized.data.astype(np.float32) - ZERO) * quantized.scales[:, :, None]
    return values.reshape(len(values), -1)[:, : quantized.columns]


def choose_block_size(columns: int) -> int:
    """32 weights to a scale, or 16 where padding a row to a multiple of 32 costs more than the further scales."""
    return min(_BLOCK_SIZES, key=lambda size: -(-columns // size) * (size + 1))


def join(parts: Sequence[Int8Blocks]) -> Int8Blocks:
    """Matrices of equal K and block size below one another, as one."""
    if len(parts) == 1:
        return parts[0]
    return Int8Blocks(
        np.concatenate([part.data for part in parts]),
        np.concatenate([part.scale_codes for part in parts]),
        np.concatenate([part.row_scales for part in parts]),
        parts[0].columns,
    )


def encode_scales(
    scales: np.ndarray, rounded: Callable[[np.ndarray], np.ndarray] = np.ceil
) -> tuple[np.ndarray, np.ndarray]:
    """Scale codes (N, blocks) uint8 and row scales (N, 1) float32 whose product is no smaller than the scales.

    With `rounded` np.rint it is the nearest to them instead.
    """
    row_scales = scales.max(1, keepdims=True) / _LARGEST_CODE
    # A row of zeros, or of numbers too small to divide by, is stored as zeros.
    row_scales[row_scales < np.finfo(np.float32).tiny] = 1
    scale_codes = np.clip(rounded(scales / row_scales), 1, _LARGEST_CODE)
    return scale_codes.astype(np.uint8), row_scales.astype(np.float32)

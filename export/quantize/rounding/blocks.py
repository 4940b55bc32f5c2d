"""Matrices in blocks of small integers, in the layout of com.microsoft.MatMulNBits: arrays only.

Each row of a matrix is cut into blocks of `block_size` weights that share one scale. Scales are double quantized, as in
QLoRA and k-quants: a scale code of a byte, from 1 to 255, times one float32 row scale. They are rounded up, so that no
weight is clipped.

    int8   round(w / scale) + 128 in a uint8; the scale is max |w| / 127

`int4_blocks` rounds to 4 bits, with a zero point for each block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

ZERO = 128  # the stored value of an int8 weight of 0
_BLOCK_SIZES = (32, 16)
_LARGEST_CODE = np.float32(255)


@dataclass(frozen=True)
class Blocks:
    """A matrix (N, K) in blocks of integers, in the layout of com.microsoft.MatMulNBits.

    4-bit values are packed two per byte, the lower first. The last block of a row is padded with its zero point.
    """

    data: np.ndarray  # (N, blocks, block_size * bits / 8) uint8
    scale_codes: np.ndarray  # (N, blocks) uint8: the scale over the row scale
    row_scales: np.ndarray  # (N, 1) float32
    columns: int  # K
    zeros: np.ndarray | None = None  # (N, blocks * bits / 8 rounded up) uint8: the zero points; None: ZERO
    bits: int = 8

    @property
    def block_size(self) -> int:
        """Weights per scale."""
        return int(self.data.shape[2]) * 8 // self.bits

    @property
    def scales(self) -> np.ndarray:
        """(N, blocks) float32, as the graph computes them."""
        scales: np.ndarray = self.scale_codes.astype(np.float32) * self.row_scales
        return scales


def quantize_blocks(matrix: np.ndarray, block_size: int) -> Blocks:
    """Quantizes (N, K) float32 to int8, row by row. Raises ValueError on NaN or infinity."""
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
    return Blocks(data.astype(np.uint8), scale_codes, row_scales, columns)


def dequantize_blocks(quantized: Blocks) -> np.ndarray:
    """Returns (N, K) float32 from int8, the values that the kernels compute with."""
    values: np.ndarray = (quantized.data.astype(np.float32) - ZERO) * quantized.scales[:, :, None]
    return values.reshape(len(values), -1)[:, : quantized.columns]


def choose_block_size(columns: int) -> int:
    """Returns 32 weights per scale, or 16 if padding rows to a multiple of 32 costs more than the additional scales."""
    return min(_BLOCK_SIZES, key=lambda size: -(-columns // size) * (size + 1))


def join(parts: Sequence[Blocks]) -> Blocks:
    """Stacks matrices of equal K, bits and block size vertically."""
    first = parts[0]
    names = [field.name for field in fields(first) if isinstance(getattr(first, field.name), np.ndarray)]
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return replace(first, **arrays)


def encode_scales(
    scales: np.ndarray, rounded: Callable[[np.ndarray], np.ndarray] = np.ceil
) -> tuple[np.ndarray, np.ndarray]:
    """Returns scale codes (N, blocks) uint8 and row scales (N, 1) float32, whose product is at least the scales.

    With np.rint as `rounded`, the product is the nearest to them instead.
    """
    row_scales = scales.max(1, keepdims=True) / _LARGEST_CODE
    # Rows of zeros, or of numbers too small to divide by, are stored as zeros.
    row_scales[row_scales < np.finfo(np.float32).tiny] = 1
    scale_codes = np.clip(rounded(scales / row_scales), 1, _LARGEST_CODE)
    return scale_codes.astype(np.uint8), row_scales.astype(np.float32)

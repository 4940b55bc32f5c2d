"""The values (N, K) float32 that the kernels compute with, of quantized matrices."""

from __future__ import annotations

import numpy as np

from pastkey.export.quantize.rounding.blocks import ZERO, Blocks
from pastkey.export.quantize.rounding.int4_blocks import unpacked


def dequantize_blocks(quantized: Blocks) -> np.ndarray:
    """Of int8."""
    values: np.ndarray = (quantized.data.astype(np.float32) - ZERO) * quantized.scales[:, :, None]
    return values.reshape(len(values), -1)[:, : quantized.columns]


def dequantize(matrix: Blocks) -> np.ndarray:
    """Of 4 bits."""
    assert matrix.zeros is not None
    rows, blocks, half = matrix.data.shape
    numbers = unpacked(matrix.data.reshape(rows, -1)).reshape(rows, blocks, 2 * half)
    zeros = unpacked(matrix.zeros)[:, :blocks]
    values: np.ndarray = (numbers.astype(np.float32) - zeros[:, :, None]) * matrix.scales[:, :, None]
    return values.reshape(rows, -1)[:, : matrix.columns]

"""The values (N, K) float32 that the kernels compute with, of quantized matrices."""

from __future__ import annotations

import numpy as np

from pastkey.export.graph.blocks import Blocks, unpacked
from pastkey.export.quantize.rounding.blocks import ZERO


def dequantize(matrix: Blocks) -> np.ndarray:
    rows, blocks, _ = matrix.data.shape
    numbers, zeros = matrix.data, np.full((rows, blocks), ZERO, np.float32)
    if matrix.zeros is not None:
        numbers, zeros = unpacked(numbers.reshape(rows, -1)).reshape(rows, blocks, -1), unpacked(matrix.zeros)
    values: np.ndarray = (numbers.astype(np.float32) - zeros[:, :blocks, None]) * matrix.scales.values[:, :, None]
    return values.reshape(rows, -1)[:, : matrix.columns]

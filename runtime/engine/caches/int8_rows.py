"""Rows of the native graph's int8 cache: D codes, then the row's scale as a float32, max |x| / 127.

Channels of keys differ in size, so keys are divided by a scale for each channel first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.contract.bundle import SCALE_BYTES

Rows = npt.NDArray[Any]


def decoded(rows: Rows) -> Rows:
    """Rows (..., D + 4) int8 as (..., D) float32."""
    scales = np.ascontiguousarray(rows[..., -SCALE_BYTES:]).view(np.float32)
    return rows[..., :-SCALE_BYTES] * scales


def encoded(rows: Rows) -> Rows:
    """Rows (..., D) float32 as (..., D + 4) int8."""
    scales = np.abs(rows).max(-1, keepdims=True) / np.float32(127)
    codes = np.rint(rows / np.where(scales > 0, scales, np.float32(1))).astype(np.int8)
    return np.concatenate([codes, scales.astype(np.float32).view(np.int8)], -1)

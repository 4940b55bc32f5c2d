"""Rounds matrices to int8 in blocks, and stacks matrices in blocks.

Each row of a matrix is cut into blocks of `block_size` weights that share one scale. Scales of matrices that are
rounded here are double quantized, as in QLoRA and k-quants: a scale code of a byte, from 1 to 255, times one float32
row scale. They are rounded up, so that no weight is clipped.

    int8   round(w / scale) + 128 in a uint8; the scale is max |w| / 127

`int4_blocks` rounds to 4 bits, with a zero point for each block. `kept` reads blocks from a source's file unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from ...graph.blocks import Blocks, Numbers
from .workers import for_each_part, one_thread_each

ZERO = 128  # the stored value of an int8 weight of 0
_BLOCK_SIZES = (32, 16)
_SOME_OUTPUTS = 512
_LARGEST_CODE = np.float32(255)


def quantize_blocks(matrix: np.ndarray, block_size: int) -> Blocks:
    """Quantizes (N, K) float32 to int8, row by row. Raises ValueError on NaN or infinity.

    Chooses the scales now. The integers are made from the matrix whenever they are asked for.
    """
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    scale_codes, row_scales = np.empty((rows, blocks), np.uint8), np.empty((rows, 1), np.float32)

    def choose(part: slice) -> None:
        scale_codes[part], row_scales[part] = _scales(in_blocks(matrix[part], block_size))

    def make() -> np.ndarray:
        data = np.empty((rows, blocks, block_size), np.uint8)

        def fill(part: slice) -> None:
            numbers = _integers(in_blocks(matrix[part], block_size), scale_codes[part], row_scales[part])
            numbers += ZERO
            data[part] = numbers

        for_each_part(fill, rows)
        return data

    for_each_part(choose, rows)
    return Blocks(make, Numbers(row_scales, scale_codes), columns, block_size)


def some_outputs(matrix: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns some rows of a matrix (N, K), spread over all, and the number of rows that each represents."""
    some = matrix[:: max(1, len(matrix) // _SOME_OUTPUTS)]
    return some, len(matrix) / len(some)


def round_trip(rows: np.ndarray, block_size: int) -> np.ndarray:
    """Returns a few rows (n, K) float32 as they are after `quantize_blocks`."""
    blocks = in_blocks(rows, block_size)
    scale_codes, row_scales = _scales(blocks)
    numbers = _integers(blocks, scale_codes, row_scales)
    numbers *= (scale_codes.astype(np.float32) * row_scales)[:, :, None]
    return numbers.reshape(len(rows), -1)[:, : rows.shape[1]]


def in_blocks(rows: np.ndarray, block_size: int) -> np.ndarray:
    """Returns a copy of some rows (n, K), padded with zeros to (n, blocks, block_size)."""
    count, columns = rows.shape
    blocks = -(-columns // block_size)
    padded = np.zeros((count, blocks * block_size), np.float32)
    padded[:, :columns] = rows.copy("K")  # rows of a transposed matrix: a compact copy is transposed 3 times as fast
    return padded.reshape(count, blocks, block_size)


def _scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    largest = torch.from_numpy(blocks).abs().amax(2).numpy()  # numpy is 7 times as slow
    if not np.isfinite(largest).all():
        raise ValueError("NaN or infinity")
    return encode_scales(largest / np.float32(127))


def _integers(blocks: np.ndarray, scale_codes: np.ndarray, row_scales: np.ndarray) -> np.ndarray:
    """Replaces weights (n, blocks, block_size) by integers from -127 to 127, as float32, and returns them."""
    blocks /= (scale_codes.astype(np.float32) * row_scales)[:, :, None]
    return np.clip(np.rint(blocks, out=blocks), -127, 127, out=blocks)


def choose_block_size(columns: int) -> int:
    """Returns 32 weights per scale, or 16 if padding rows to a multiple of 32 costs more than the additional scales."""
    return min(_BLOCK_SIZES, key=lambda size: -(-columns // size) * (size + 1))


def join(parts: Sequence[Blocks]) -> Blocks:
    """Stacks matrices of one form vertically."""
    first = parts[0]
    if len(parts) == 1:
        return first
    return replace(
        first,
        make=lambda: _made(parts),
        scales=stacked([part.scales for part in parts]),
        zeros=_stacked([part.zeros for part in parts]),
        offsets=None if first.offsets is None else stacked([part.offsets for part in parts if part.offsets]),
    )


def _made(parts: Sequence[Blocks]) -> np.ndarray:
    with one_thread_each() as pool:
        return np.concatenate(list(pool.map(lambda part: part.data, parts)))


def stacked(parts: Sequence[Numbers]) -> Numbers:
    """Stacks numbers of one form vertically."""
    return Numbers(np.concatenate([part.factors for part in parts]), _stacked([part.codes for part in parts]))


def _stacked(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    arrays = [part for part in parts if part is not None]
    return np.concatenate(arrays) if arrays else None


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

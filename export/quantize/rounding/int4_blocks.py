"""Matrices in 4-bit blocks, rounded by GPTQ to minimise the change of a projection's output on text: arrays only.

A weight is (q - zero) * scale, q from 0 to 15, with a scale and an integer zero point for each block of a row. Scales
are double quantized as in `blocks`: scale codes of a byte, times one float32 row scale.

GPTQ, https://arxiv.org/abs/2210.17323: the columns of a matrix are rounded to nearest one after another, the most
important first, and the remaining columns compensate the error of each. Scales and zero points are chosen before, by
the error that cannot be compensated. The Hessian of the output's error is X^T X over the activations X on text.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .blocks import Blocks, encode_scales

BITS = 4
_TOP = 15
_SHRINKS = np.linspace(1, 0.5, 16).tolist()  # of a block's range: clipping may cost less than coarser steps
# Added to the Hessian's diagonal, relative to its mean. It is large, since texts differ from the calibration text.
_DAMPING = 0.2
_ROWS_AT_ONCE = 128  # rows whose scales are searched together: they fit into a core's cache
_LAZY_COLUMNS = 64  # columns whose compensation by all later columns is one MatMul (GPTQ's lazy batch updates)


def round_by_hessian(matrix: np.ndarray, hessian: np.ndarray, block_size: int) -> Blocks:
    """Rounds a matrix to 4 bits by GPTQ.

    Args:
        matrix: (N, K) float32.
        hessian: (K, K) float32: X^T X over the activations X (T, K) that the matrix is multiplied with.
        block_size: Weights per scale.

    Raises:
        ValueError: The matrix holds NaN or infinity.
    """
    if not np.isfinite(matrix).all():
        raise ValueError("NaN or infinity")
    rows, columns = matrix.shape
    if not np.isfinite(hessian).all():  # squares of activations beyond 1e19 overflow float32: weight all alike
        hessian = np.eye(columns, dtype=np.float32)
    blocks = -(-columns // block_size)
    order = np.argsort(-hessian.diagonal(), kind="stable")
    factor = _compensation(hessian[np.ix_(order, order)])  # (K, K)
    importance = np.zeros(blocks * block_size, np.float32)
    importance[order] = 1 / np.square(factor.diagonal())
    padded = np.zeros((rows, blocks * block_size), np.float32)
    padded[:, :columns] = matrix
    in_blocks = torch.from_numpy(padded.reshape(rows, blocks, block_size))
    of_columns = torch.from_numpy(importance.reshape(blocks, block_size))
    found = [_scales_and_zeros(part, of_columns) for part in in_blocks.split(_ROWS_AT_ONCE)]
    scales, zeros = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    scale_codes, row_scales = encode_scales(scales, np.rint)
    scales = scale_codes.astype(np.float32) * row_scales
    of_column = order // block_size
    numbers = np.repeat(zeros, block_size, 1)
    # Transposed, so that a column is contiguous.
    left, of_scales, of_zeros = (
        torch.from_numpy(np.ascontiguousarray(array.T))
        for array in (matrix[:, order], scales[:, of_column], zeros[:, of_column])
    )
    numbers[:, order] = _round(left, of_scales, of_zeros, torch.from_numpy(factor)).T
    return Blocks(_packed(numbers).reshape(rows, blocks, -1), scale_codes, row_scales, columns, _packed(zeros), BITS)


def dequantize(matrix: Blocks) -> np.ndarray:
    """Returns (N, K) float32, the values that the kernels compute with."""
    assert matrix.zeros is not None
    rows, blocks, half = matrix.data.shape
    numbers = unpacked(matrix.data.reshape(rows, -1)).reshape(rows, blocks, 2 * half)
    zeros = unpacked(matrix.zeros)[:, :blocks]
    values: np.ndarray = (numbers.astype(np.float32) - zeros[:, :, None]) * matrix.scales[:, :, None]
    return values.reshape(rows, -1)[:, : matrix.columns]


def _compensation(hessian: np.ndarray) -> np.ndarray:
    """Returns the upper Cholesky factor of the damped Hessian's inverse.

    Row k is how later columns compensate column k's error. 1 / its diagonal, squared, is the cost of each column's
    error after this compensation.
    """
    damped = hessian.astype(np.float64)
    mean = damped.diagonal().mean()
    damped[np.diag_indices_from(damped)] += _DAMPING * mean if mean > 0 else 1  # no activation was ever nonzero
    inverse = np.linalg.inv(damped)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)


def _scales_and_zeros(padded: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scales and zero points (N, blocks) that minimise squared error times importance, (N, blocks, size)."""
    tiny = torch.finfo(torch.float32).tiny
    low, high = padded.amin(2).clamp(max=0), padded.amax(2).clamp(min=0)
    widest = ((high - low) / _TOP).clamp(min=tiny)
    middle = (-low / widest).round().clamp(0, _TOP)
    best, scales, zeros = torch.full_like(low, torch.inf), widest, middle
    for shrink in _SHRINKS:
        for shift in (0, -1, 1):
            zero, scale = (middle + shift).clamp(0, _TOP), widest * shrink
            numbers = _centred(padded, scale, zero)
            # Compute the best scale for these integers, then the integers again.
            weighted = numbers * importance
            above, below = (weighted * padded).sum(2), (weighted * numbers).sum(2)
            scale = torch.where(above > 0, above / below.clamp(min=tiny), scale).clamp(min=tiny)
            errors = padded - _centred(padded, scale, zero) * scale[..., None]
            error = (errors.square_() * importance).sum(2)
            better = error < best
            best, scales, zeros = (
                torch.where(better, new, old) for new, old in ((error, best), (scale, scales), (zero, zeros))
            )
    return scales, zeros


def _centred(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Returns q - zero of blocks (N, blocks, size)."""
    zero = zero[..., None]
    return (values / scale[..., None]).round_().clamp_(-zero, _TOP - zero)


def _round(left: Tensor, scales: Tensor, zeros: Tensor, factor: Tensor) -> np.ndarray:
    """Returns q (K, N): rounds each column of the matrix to nearest, and later columns compensate the error.

    All arguments are in the order in which columns are rounded.
    """
    numbers = torch.empty_like(left)
    for start in range(0, len(left), _LAZY_COLUMNS):
        end = min(start + _LAZY_COLUMNS, len(left))
        errors = torch.empty_like(left[start:end])
        for k in range(start, end):
            numbers[k] = ((left[k] / scales[k]).round_() + zeros[k]).clamp_(0, _TOP)
            errors[k - start] = (left[k] - (numbers[k] - zeros[k]) * scales[k]) / factor[k, k]
            left[k + 1 : end].addr_(factor[k, k + 1 : end], errors[k - start], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return numbers.numpy()


def _packed(numbers: np.ndarray) -> np.ndarray:
    """Packs numbers from 0 to 15, (N, n), to (N, n / 2 rounded up) uint8."""
    even = np.pad(numbers.astype(np.uint8), ((0, 0), (0, numbers.shape[1] % 2)))
    packed: np.ndarray = even[:, 0::2] | even[:, 1::2] << 4
    return packed


def unpacked(packed: np.ndarray) -> np.ndarray:
    """Unpacks (N, n) uint8, two numbers in each, to (N, 2 n) numbers from 0 to 15."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)


# --- without a text -----------------------------------------------------------------------------------------------
def round_to_nearest(matrix: np.ndarray, block_size: int) -> Blocks:
    """Rounds each weight of a matrix (N, K) float32 to 4 bits by itself. Raises ValueError on NaN or infinity."""
    if not np.isfinite(matrix).all():
        raise ValueError("NaN or infinity")
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    padded = np.zeros((rows, blocks * block_size), np.float32)
    padded[:, :columns] = matrix
    in_blocks = torch.from_numpy(padded.reshape(rows, blocks, block_size))
    alike = torch.from_numpy((np.arange(blocks * block_size) < columns).astype(np.float32).reshape(blocks, block_size))
    found = [_scales_and_zeros(part, alike) for part in in_blocks.split(_ROWS_AT_ONCE)]
    scales, zeros = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    scale_codes, row_scales = encode_scales(scales, np.rint)
    exact = torch.from_numpy(scale_codes.astype(np.float32) * row_scales)
    steps = _centred(in_blocks, exact, torch.from_numpy(zeros)).numpy()
    data = _packed((steps + zeros[:, :, None]).reshape(rows, -1)).reshape(rows, blocks, -1)
    return Blocks(data, scale_codes, row_scales, columns, _packed(zeros), BITS)

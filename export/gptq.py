"""Matrices in blocks of 4-bit numbers, rounded so that their products on text change least: arrays only.

A weight is (q - zero) * scale, q from 0 to 15, with a scale and a whole zero point for each block of a row. Scales are
bytes times one float32 of the row, as in `blocks`.

GPTQ, https://arxiv.org/abs/2210.17323: the columns of a matrix are rounded one after another, those that matter most
first, and what each rounding costs is made good by the columns that are left. Scales and zero points are chosen before,
by the error that cannot be made good. The Hessian of a product's error is X^T X over its activations X on text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .blocks import encode_scales

_TOP = 15
_SHRINKS = np.linspace(1, 0.5, 16).tolist()  # of a block's range: what is cut off may cost less than coarser steps
# Added to the Hessian's diagonal, of its mean. Much, since other texts than the calibration text are written, too.
_DAMPING = 0.2
_ROWS = 128  # whose ranges are looked for at once: what a core's cache holds
_CHUNK = 64  # columns whose effect on those behind them is added up at once


@dataclass(frozen=True)
class FourBit:
    """A matrix (N, K) in blocks of 4 bits, as com.microsoft.MatMulNBits reads them: two in a byte, the lower first."""

    data: np.ndarray  # (N, blocks, block_size / 2) uint8; the last block padded with its zero point
    zeros: np.ndarray  # (N, blocks / 2, rounded up) uint8: the zero points
    codes: np.ndarray  # (N, blocks) uint8: the scale over the row's factor
    factors: np.ndarray  # (N, 1) float32
    columns: int  # K

    @property
    def block_size(self) -> int:
        """Weights to a scale."""
        return 2 * int(self.data.shape[2])


def round_by_hessian(matrix: np.ndarray, hessian: np.ndarray, block_size: int) -> FourBit:
    """Rounds (N, K) float32 by the Hessian (K, K) float32. Raises ValueError on NaN or infinity."""
    if not np.isfinite(matrix).all():
        raise ValueError("NaN or infinity")
    rows, columns = matrix.shape
    if not np.isfinite(hessian).all():  # activations beyond 1e19, whose squares are no float32: all count alike
        hessian = np.eye(columns, dtype=np.float32)
    blocks = -(-columns // block_size)
    order = np.argsort(-hessian.diagonal(), kind="stable")
    factor = _compensation(hessian[np.ix_(order, order)])  # (K, K)
    weights = np.zeros(blocks * block_size, np.float32)
    weights[order] = 1 / np.square(factor.diagonal())
    padded = np.zeros((rows, blocks * block_size), np.float32)
    padded[:, :columns] = matrix
    in_blocks = torch.from_numpy(padded.reshape(rows, blocks, block_size))
    found = [_ranges(part, torch.from_numpy(weights.reshape(blocks, block_size))) for part in in_blocks.split(_ROWS)]
    scales, zeros = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    codes, factors = encode_scales(scales, np.rint)
    scales = codes.astype(np.float32) * factors
    of_column = order // block_size
    numbers = np.repeat(zeros, block_size, 1)
    # Transposed, so that a column lies together.
    left, of_scales, of_zeros = (
        torch.from_numpy(np.ascontiguousarray(array.T))
        for array in (matrix[:, order], scales[:, of_column], zeros[:, of_column])
    )
    numbers[:, order] = _round(left, of_scales, of_zeros, torch.from_numpy(factor)).T
    return FourBit(_packed(numbers).reshape(rows, blocks, -1), _packed(zeros), codes, factors, columns)


def dequantize(matrix: FourBit) -> np.ndarray:
    """(N, K) float32, what the kernels compute with."""
    rows, blocks, half = matrix.data.shape
    numbers = _unpacked(matrix.data.reshape(rows, -1)).reshape(rows, blocks, 2 * half)
    zeros = _unpacked(matrix.zeros)[:, :blocks]
    scales = matrix.codes.astype(np.float32) * matrix.factors
    values: np.ndarray = (numbers.astype(np.float32) - zeros[:, :, None]) * scales[:, :, None]
    return values.reshape(rows, -1)[:, : matrix.columns]


def join(parts: list[FourBit]) -> FourBit:
    """Matrices of equal K and block size below one another, as one."""
    data, zeros, codes, factors = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("data", "zeros", "codes", "factors")
    )
    return FourBit(data, zeros, codes, factors, parts[0].columns)


def _compensation(hessian: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor of the damped Hessian's inverse: row k is what column k's error asks of those behind.

    1 / its diagonal, squared, is what an error of each column costs when the columns behind have made good what they
    can.
    """
    damped = hessian.astype(np.float64)
    mean = damped.diagonal().mean()
    damped[np.diag_indices_from(damped)] += _DAMPING * mean if mean > 0 else 1  # nothing was ever read
    inverse = np.linalg.inv(damped)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)


def _ranges(padded: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points (N, blocks) of blocks (N, blocks, size), by the weighted square of the error."""
    tiny = torch.finfo(torch.float32).tiny
    low, high = padded.amin(2).clamp(max=0), padded.amax(2).clamp(min=0)
    widest = ((high - low) / _TOP).clamp(min=tiny)
    middle = (-low / widest).round().clamp(0, _TOP)
    best, scales, zeros = torch.full_like(low, torch.inf), widest, middle
    for shrink in _SHRINKS:
        for shift in (0, -1, 1):
            zero, scale = (middle + shift).clamp(0, _TOP), widest * shrink
            numbers = _centred(padded, scale, zero)
            # The best scale for these very numbers, and the numbers anew.
            weighted = numbers * weights
            above, below = (weighted * padded).sum(2), (weighted * numbers).sum(2)
            scale = torch.where(above > 0, above / below.clamp(min=tiny), scale).clamp(min=tiny)
            errors = padded - _centred(padded, scale, zero) * scale[..., None]
            error = (errors.square_() * weights).sum(2)
            better = error < best
            best, scales, zeros = (
                torch.where(better, new, old) for new, old in ((error, best), (scale, scales), (zero, zeros))
            )
    return scales, zeros


def _centred(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """q - zero of blocks (N, blocks, size)."""
    zero = zero[..., None]
    return (values / scale[..., None]).round_().clamp_(-zero, _TOP - zero)


def _round(left: Tensor, scales: Tensor, zeros: Tensor, factor: Tensor) -> np.ndarray:
    """q (K, N), column after column of the matrix; all that is given is in the order in which they are rounded."""
    numbers = torch.empty_like(left)
    for start in range(0, len(left), _CHUNK):
        end = min(start + _CHUNK, len(left))
        errors = torch.empty_like(left[start:end])
        for k in range(start, end):
            numbers[k] = ((left[k] / scales[k]).round_() + zeros[k]).clamp_(0, _TOP)
            errors[k - start] = (left[k] - (numbers[k] - zeros[k]) * scales[k]) / factor[k, k]
            left[k + 1 : end].addr_(factor[k, k + 1 : end], errors[k - start], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return numbers.numpy()


def _packed(numbers: np.ndarray) -> np.ndarray:
    """(N, n) numbers from 0 to 15 as (N, n / 2 rounded up) uint8."""
    even = np.pad(numbers.astype(np.uint8), ((0, 0), (0, numbers.shape[1] % 2)))
    packed: np.ndarray = even[:, 0::2] | even[:, 1::2] << 4
    return packed


def _unpacked(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)

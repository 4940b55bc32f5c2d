"""Matrices in 4-bit blocks, rounded by GPTQ to minimise the change of a projection's output on text: arrays only.

A weight is (q - zero) * scale, q from 0 to 15, with a scale and an integer zero point for each block of a row. Scales
are double quantized as in `blocks`: scale codes of a byte, times one float32 row scale.

GPTQ, https://arxiv.org/abs/2210.17323: the columns of a matrix are rounded to nearest one after another, the most
important first, and each compensates the errors of those before it. Scales and zero points are chosen before, by the
error that cannot be compensated. The Hessian of the output's error is X^T X over the activations X on text.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...graph.blocks import Blocks, Numbers, packed
from .blocks import encode_scales, in_blocks, some_outputs

BITS = 4
_TOP = 15
_STEP = 1 / 30
_SHRINKS = [1 - _STEP * n for n in range(16)]  # of a block's range: clipping may cost less than coarser steps
# Added to the Hessian's diagonal, relative to its mean. It is large, since texts differ from the calibration text.
_DAMPING = 0.2
_ROWS_AT_ONCE = 128  # rows whose scales are searched together: they fit into a core's cache
_LAZY_COLUMNS = 64  # columns that compensate all earlier ones by one MatMul (GPTQ's lazy batch updates)


class Rounded(NamedTuple):
    """A matrix W (N, K) in 4 bits, and how far its product with the text's activations is from the exact one."""

    blocks: Blocks
    error: float  # tr(E H E^T) / tr(W H W^T), E = W - rounded W; the first H is damped, the second term estimated


class Gptq:
    """Rounds the matrices that are multiplied with the same activations to 4 bits."""

    def __init__(self, hessian: np.ndarray) -> None:
        """`hessian`: (K, K) float32: X^T X over the activations X (T, K) that the matrices are multiplied with."""
        if not np.isfinite(hessian).all():  # squares of activations beyond 1e19 overflow float32: weight all alike
            hessian = np.eye(len(hessian), dtype=np.float32)
        self._hessian = torch.from_numpy(hessian)
        self._order = np.argsort(-hessian.diagonal(), kind="stable")
        self._costs, self._shares = _compensation(hessian, self._order)

    def round(self, matrix: np.ndarray, block_size: int) -> Rounded:
        """Rounds a matrix (N, K) float32 with `block_size` weights per scale. Raises ValueError on NaN or infinity."""
        columns = matrix.shape[1]
        importance = np.empty(columns, np.float32)
        importance[self._order] = self._costs
        grid = _grid(matrix, importance, block_size)
        scales, of_column = grid.scales.values, self._order // block_size
        numbers = np.repeat(grid.zeros, block_size, 1)
        # Transposed, so that a column is contiguous.
        left, of_scales, of_zeros = (
            torch.from_numpy(np.ascontiguousarray(array.T))
            for array in (matrix[:, self._order], scales[:, of_column], grid.zeros[:, of_column])
        )
        rounded, error = _round(left, of_scales, of_zeros, self._costs, self._shares)
        numbers[:, self._order] = rounded.T
        some, each = some_outputs(matrix)
        weights = torch.from_numpy(np.ascontiguousarray(some))
        whole = each * float(torch.vdot((weights @ self._hessian).flatten(), weights.flatten()))
        relative = error / whole if 0 < whole < np.inf else 0.0
        return Rounded(grid.blocks(numbers, columns, block_size), relative)


def round_to_nearest(matrix: np.ndarray, block_size: int) -> Blocks:
    """Rounds a matrix (N, K) float32 without a text. Raises ValueError on NaN or infinity."""
    rows, columns = matrix.shape
    grid = _grid(matrix, np.ones(columns, np.float32), block_size)
    centred = _centred(*map(torch.from_numpy, (in_blocks(matrix, block_size), grid.scales.values, grid.zeros)))
    numbers = np.repeat(grid.zeros, block_size, 1) + centred.reshape(rows, -1).numpy()
    return grid.blocks(numbers, columns, block_size)


class _Grid(NamedTuple):
    """The values that the weights of each block of a matrix (N, K) are rounded to."""

    scales: Numbers
    zeros: np.ndarray  # (N, blocks) float32, from 0 to 15

    def blocks(self, numbers: np.ndarray, columns: int, block_size: int) -> Blocks:
        """Packs q (N, blocks * block_size)."""
        data = packed(numbers).reshape(*self.zeros.shape, -1)
        return Blocks(lambda: data, self.scales, columns, block_size, packed(self.zeros), BITS)


def _grid(matrix: np.ndarray, importance: np.ndarray, block_size: int) -> _Grid:
    """Chooses scales and zero points by the error to nearest, weighted by the importance (K,) of each column."""
    if not np.isfinite(matrix).all():
        raise ValueError("NaN or infinity")
    blocks, of_columns = (torch.from_numpy(in_blocks(rows, block_size)) for rows in (matrix, importance[None]))
    found = [_scales_and_zeros(part, of_columns[0]) for part in blocks.split(_ROWS_AT_ONCE)]
    scales, zeros = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    scale_codes, row_scales = encode_scales(scales, np.rint)
    return _Grid(Numbers(row_scales, scale_codes), zeros)


def _compensation(hessian: np.ndarray, order: np.ndarray) -> tuple[Tensor, Tensor]:
    """Returns the cost of each column's squared error (K,), and the shares (K, K) of it that later columns compensate.

    Rows and columns are in this order. The damped Hessian is V V^T with an upper V, so that E H E^T is the sum of
    squares of E V: its column k is V[k, k] times the sum of E[k] and of the shares V[j, k] / V[k, k] of earlier E[j].
    """
    backwards = np.ascontiguousarray(order[::-1])
    damped = torch.from_numpy(hessian[np.ix_(backwards, backwards)])
    mean = float(damped.diagonal().mean())
    damped.diagonal().add_(_DAMPING * mean if mean > 0 else 1)  # 1: no activation was ever nonzero
    factor = torch.linalg.cholesky(damped).flip(0, 1)
    costs = factor.diagonal().clone()
    return costs.square(), factor.div_(costs)


def _scales_and_zeros(padded: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scales and zero points (N, blocks) that minimise squared error times importance, (N, blocks, size).

    First tries every shrink with the middle zero point, then its neighbours around the best shrink.
    """
    tiny = torch.finfo(torch.float32).tiny
    low, high = padded.amin(2).clamp(max=0), padded.amax(2).clamp(min=0)
    widest = ((high - low) / _TOP).clamp(min=tiny)
    middle = (-low / widest).round().clamp(0, _TOP)
    important = padded * importance
    best = [torch.full_like(low, -torch.inf), widest, middle, torch.ones_like(low)]  # gain, scale, zero point, shrink

    def attempt(shrink: Tensor, zero: Tensor) -> None:
        numbers = _centred(padded, widest * shrink, zero)
        # The best scale of these integers q is sum(w q) / sum(q q), and removes this much of the error of q = 0.
        above, below = (important * numbers).sum(2), (numbers.square_() * importance).sum(2).clamp(min=tiny)
        scale = torch.where(above > 0, above / below, widest * shrink)
        gain = above * scale
        found, better = (gain, scale.clamp(min=tiny), zero, shrink), gain > best[0]
        best[:] = [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]

    for shrink in _SHRINKS:
        attempt(torch.full_like(low, shrink), middle)
    chosen = best[3]  # of each block
    for step in (0, -_STEP, _STEP):
        for shift in (-1, 1):
            attempt(chosen + step, (middle + shift).clamp(0, _TOP))
    return best[1], best[2]


def _centred(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Returns q - zero of blocks (N, blocks, size)."""
    zero = zero[..., None]
    return (values / scale[..., None]).round_().clamp_(-zero, _TOP - zero)


def _round(left: Tensor, scales: Tensor, zeros: Tensor, costs: Tensor, shares: Tensor) -> tuple[np.ndarray, float]:
    """Rounds each column to nearest after its shares of the errors of those before it are added.

    Returns q (K, N), and tr(E H E^T). `left` (K, N) becomes the errors E.

    All arguments are in the order in which columns are rounded.
    """
    numbers, total = torch.empty_like(left), 0.0
    for start in range(0, len(left), _LAZY_COLUMNS):
        end = min(start + _LAZY_COLUMNS, len(left))
        wanted = torch.addmm(left[start:end], shares[:start, start:end].T, left[:start])
        for k in range(start, end):
            column = wanted[k - start]
            numbers[k] = ((column / scales[k]).round_() + zeros[k]).clamp_(0, _TOP)
            found = (numbers[k] - zeros[k]) * scales[k]
            column -= found
            left[k] -= found
            wanted[k - start + 1 :].addr_(shares[k, k + 1 : end], left[k])
        total += float((wanted.square_() * costs[start:end, None]).sum())
    return numbers.numpy(), total

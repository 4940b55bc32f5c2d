"""Matrices in blocks of small integers, in the layout of com.microsoft.MatMulNBits: arrays only."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Numbers:
    """A number for each block of a matrix, (N, blocks): codes times factors, or only factors."""

    factors: np.ndarray  # (N, groups) float32, each of blocks / groups codes; without codes (N, blocks), or in float16
    codes: np.ndarray | None = None  # (N, blocks) uint8

    @property
    def shape(self) -> tuple[int, int]:
        """(N, blocks)."""
        rows, blocks = (self.factors if self.codes is None else self.codes).shape
        return rows, blocks

    @property
    def values(self) -> np.ndarray:
        """(N, blocks) float32, as the graph computes them."""
        if self.codes is None:
            return self.factors.astype(np.float32)
        rows, groups = self.factors.shape
        products: np.ndarray = self.codes.reshape(rows, groups, -1).astype(np.float32) * self.factors[:, :, None]
        return products.reshape(self.codes.shape)

    @property
    def form(self) -> tuple[Hashable, ...]:
        """Equal for numbers that can be stored in one table."""
        return self.shape[1], self.factors.shape[1], self.factors.dtype.name, self.codes is None


@dataclass(frozen=True)
class Blocks:
    """A matrix (N, K) in blocks of integers, in the layout of com.microsoft.MatMulNBits.

    A weight is (q - zero point) * scale, or q * scale - offset. 4-bit values are packed two per byte, the lower first.
    The last block of a row is padded with its zero point.
    """

    make: Callable[[], np.ndarray]  # returns `data`
    scales: Numbers
    columns: int  # K
    block_size: int  # weights per scale
    zeros: np.ndarray | None = None  # (N, blocks * bits / 8 rounded up) uint8: the zero points; None: the middle
    bits: int = 8
    offsets: Numbers | None = None  # there are no zero points then
    order: np.ndarray | None = None  # (K,) int64: channel k of the blocks is channel order[k] of the matrix

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, blocks, bytes of a block): the shape of `data`."""
        rows, blocks = self.scales.shape
        return rows, blocks, self.block_size * self.bits // 8

    @property
    def weights(self) -> int:
        """N * K."""
        return self.shape[0] * self.columns

    @property
    def middle(self) -> int:
        """The zero point of blocks that store none."""
        return 1 << (self.bits - 1)

    @property
    def form(self) -> tuple[Hashable, ...]:
        """Equal for matrices that can be stacked."""
        order = None if self.order is None else self.order.tobytes()
        offsets = None if self.offsets is None else self.offsets.form
        return self.bits, self.block_size, self.columns, self.zeros is None, self.scales.form, offsets, order

    @property
    def data(self) -> np.ndarray:
        """(N, blocks, block_size * bits / 8) uint8. int8 is rounded when it is asked for, so that few are in memory."""
        return self.make()

    @property
    def numbers(self) -> np.ndarray:
        """(N, blocks, block_size) uint8: q."""
        data = self.data
        return data if self.bits == 8 else unpacked(data)

    @property
    def matrix(self) -> np.ndarray:
        """(N, K) float32: the weights, in the channels of the blocks."""
        numbers = self.numbers.astype(np.float32)
        if self.offsets is None:
            zeros = self.zeros if self.zeros is None or self.bits == 8 else unpacked(self.zeros)[:, : self.shape[1]]
            numbers -= self.middle if zeros is None else zeros[:, :, None].astype(np.float32)
        numbers *= self.scales.values[:, :, None]
        if self.offsets is not None:
            numbers -= self.offsets.values[:, :, None]
        return numbers.reshape(len(numbers), -1)[:, : self.columns]


def packed(numbers: np.ndarray) -> np.ndarray:
    """Packs numbers from 0 to 15, (..., n), to (..., n / 2 rounded up) uint8."""
    numbers = numbers.astype(np.uint8)
    if numbers.shape[-1] % 2:
        numbers = np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, 1)])
    both: np.ndarray = numbers[..., 0::2] | numbers[..., 1::2] << 4
    return both


def unpacked(both: np.ndarray) -> np.ndarray:
    """Unpacks (..., n) uint8, two numbers in each, to (..., 2 n) numbers from 0 to 15."""
    return np.stack([both & 15, both >> 4], -1).reshape(*both.shape[:-1], -1)

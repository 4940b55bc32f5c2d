"""A matrix of integer codes, scales and zero points, as its file stores it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...graph.blocks import Blocks, Numbers, packed
from .computed import Computed

_BLOCKS = (32, 16)


@dataclass(frozen=True, eq=False)
class PackedMatrix(Computed):
    """weight[n, k] = (code[n, k] - zero[n, g]) * scale[n, g] in float32, where g is the group of channel k.

    It is a `FileMatrix`.

    Attributes:
        form: For people: "GPTQ, 4 bits, groups of 128".
        shape: (N, K): rows, and channels that the matrix multiplies.
        bits: 4 or 8.
        group_size: Channels with one scale: K for one scale per row.
        order: (K,) int64, the channels sorted by group; None if groups are consecutive.
        read_codes: Returns (n, K) uint8 of rows from the first to before the second number. Both are multiples of 8, or
            the second is N.
        read_scales: Returns (N, G) float32.
        read_zeros: Returns (N, G) uint8.
        read_offsets: Returns (N, G) float32: weight = code * scale - offset.
    """

    form: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    order: np.ndarray | None
    read_codes: Callable[[int, int], Tensor]
    read_scales: Callable[[], Tensor]
    read_zeros: Callable[[], Tensor] | None = None
    read_offsets: Callable[[], Tensor] | None = None

    # --- FileMatrix -----------------------------------------------------------------------------------------------
    def weights(self, rows: np.ndarray) -> np.ndarray:
        """Returns weights (n, K) float32, channels in the module's order."""
        first = int(rows.min())
        some: np.ndarray = self.part(first, int(rows.max()) + 1).numpy()[rows - first]
        return some

    def blocks(self, rows: np.ndarray) -> Blocks | None:
        """Returns some rows; None if groups are not whole blocks. A group may be several blocks."""
        size = next((size for size in _BLOCKS if self.group_size % size == 0), None)
        if size is None:
            return None

        def of_blocks(of_groups: np.ndarray) -> np.ndarray:
            return np.repeat(of_groups[rows], self.group_size // size, 1)

        def make() -> np.ndarray:
            first = int(rows.min())
            codes: np.ndarray = self._codes(first, int(rows.max()) + 1).numpy()[rows - first]
            codes = codes if self.order is None else codes[:, self.order]
            return (codes if self.bits == 8 else packed(codes)).reshape(len(rows), self.shape[1] // size, -1)

        scales, zeros, offsets = self._numbers
        if zeros is not None:
            zeros = of_blocks(zeros) if self.bits == 8 else packed(of_blocks(zeros))
        return Blocks(
            make, Numbers(of_blocks(scales)), self.shape[1], size, zeros, self.bits,
            None if offsets is None else Numbers(of_blocks(offsets)), self.order,
        )  # fmt: skip

    @functools.cached_property
    def _numbers(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Scales, float16 if that holds them, zero points and offsets, (N, G) each."""
        scales = self.read_scales().numpy()
        with np.errstate(over="ignore"):
            narrow = scales.astype(np.float16)
        zeros, offsets = (None if read is None else read().numpy() for read in (self.read_zeros, self.read_offsets))
        return narrow if np.array_equal(narrow, scales) else scales, zeros, offsets

    # --- Computed -------------------------------------------------------------------------------------------------
    def part(self, start: int, stop: int) -> Tensor:
        scales, zeros, offsets = (None if t is None else torch.from_numpy(t[start:stop]).float() for t in self._numbers)
        assert scales is not None
        shift = offsets if offsets is not None else zeros
        shift = torch.full_like(scales, 1 << self.bits - 1) if shift is None else shift
        values = self._codes(start, stop).float()
        if self.order is None:
            values = values.view(*scales.shape, self.group_size)
            scales, shift = scales[..., None], shift[..., None]
        else:
            group = torch.empty(self.shape[1], dtype=torch.long)
            group[torch.from_numpy(self.order)] = torch.arange(self.shape[1]) // self.group_size
            scales, shift = (t.gather(1, group.expand(stop - start, -1)) for t in (scales, shift))
        values = values.mul_(scales).sub_(shift) if offsets is not None else values.sub_(shift).mul_(scales)
        return values.view(stop - start, -1)

    def _codes(self, start: int, stop: int) -> Tensor:
        first = start // 8 * 8
        read = self.read_codes(first, min(-(-stop // 8) * 8, self.shape[0]))
        return read[start - first : stop - first]


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Returns the codes (..., W * 32 / bits) uint8 of int32 words (..., W), the lowest bits first."""
    content = words.contiguous().view(torch.uint8)
    return content if bits == 8 else torch.stack((content & 15, content >> 4), -1).flatten(-2)

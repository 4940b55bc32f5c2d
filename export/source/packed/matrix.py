"""A matrix of integer codes, scales and zero points, as its file stores it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...graph.blocks import Blocks, Numbers, packed

_BLOCKS = (32, 16)
_AT_ONCE = 1 << 20  # elements that are dequantized at a time, so that they stay in the processor's caches


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """weight[n, k] = (code[n, k] - zero[n, g]) * scale[n, g] in float32, where g is the group of channel k.

    It is a `FileMatrix`, and a `Stored` of `graph/stored.py`: its content is dequantized each time that it is read.

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
        [found] = self._dequantized([(first, int(rows.max()) + 1)])
        some: np.ndarray = found.numpy()[rows - first]
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

    # --- Stored ---------------------------------------------------------------------------------------------------
    def read_into(self, out: Tensor) -> None:
        rows, channels = self.shape
        step = max(8, _AT_ONCE // channels // 8 * 8)
        starts = range(0, rows, step)
        for start, part in zip(starts, self._dequantized([(i, min(i + step, rows)) for i in starts]), strict=True):
            out[start : start + step] = part

    def mapped(self, dtype: torch.dtype) -> Tensor | None:  # noqa: ARG002  # of the protocol
        return None

    def elements(self, places: Tensor) -> Tensor:
        rows, index = torch.unique(places // self.shape[1], return_inverse=True)
        read = torch.cat([*self._dequantized([(row, row + 1) for row in rows.tolist()])])
        return read[index, places % self.shape[1]]

    def _dequantized(self, parts: list[tuple[int, int]]) -> Iterator[Tensor]:
        """Yields (n, K) float32 of each part: its first row, and the row after its last."""
        scales = self.read_scales()
        if self.read_offsets is not None:
            middle = self.read_offsets()
        elif self.read_zeros is not None:
            middle = self.read_zeros().float()
        else:
            middle = torch.full_like(scales, 1 << self.bits - 1)
        group = torch.arange(scales.shape[1]).repeat_interleave(self.group_size)
        if self.order is not None:
            group[torch.from_numpy(self.order)] = group.clone()
        for start, stop in parts:
            values, (scale, shift) = self._codes(start, stop).float(), (t[start:stop] for t in (scales, middle))
            if self.order is None:
                values = values.view(*scale.shape, self.group_size)
                scale, shift = scale[..., None], shift[..., None]
            else:
                scale, shift = (t.gather(1, group.expand(stop - start, -1)) for t in (scale, shift))
            values = values.mul_(scale).sub_(shift) if self.read_offsets is not None else values.sub_(shift).mul_(scale)
            yield values.view(stop - start, -1)

    def _codes(self, start: int, stop: int) -> Tensor:
        first = start // 8 * 8
        read = self.read_codes(first, min(-(-stop // 8) * 8, self.shape[0]))
        return read[start - first : stop - first]


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Returns the codes (..., W * 32 / bits) uint8 of int32 words (..., W), the lowest bits first."""
    content = words.contiguous().view(torch.uint8)
    return content if bits == 8 else torch.stack((content & 15, content >> 4), -1).flatten(-2)

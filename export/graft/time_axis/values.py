"""A tensor of one row of a text, and where its axes are: what the rules of the operators read and write.

The module is traced on one row. A batch is an axis in front that the module does not see: where the author's batch
axis of size 1 stands in a shape is only remembered, so that merged axes (B·T, B·H) need no care.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .program.program import Op, Size

LOCAL = Op("local", (), {}, (), None, "")  # among the products of a value that is being shifted
NEW, KEY = "new", "key"  # rows of the new tokens; columns of all tokens, the earlier ones too


@dataclass(frozen=True)
class Axis:
    """One axis as the author sees it."""

    size: int  # of a time axis the factor outer · inner
    time: str | None = None  # NEW or KEY
    outer: int = 1  # a merged axis (outer, T, inner)
    inner: int = 1
    repeat: int = 1  # so many neighbours share one element of the tensor: an expanded axis that is not copied
    before: int = 0  # columns that were joined to those of all tokens, as an attention sink is
    after: int = 0
    shift: int = 0  # rows more or less than tokens, within what shifts them

    @property
    def plain_time(self) -> bool:
        return (
            self.time is not None
            and self.outer == self.inner == 1
            and not self.before
            and not self.after
            and not self.shift
        )


@dataclass(frozen=True)
class Lengths:
    """How many new tokens there are, and how many with all earlier ones. Numbers, or torch's symbolic ones."""

    new: Any
    total: Any

    def of(self, axis: Axis) -> Any:
        """The size of the tensor along an axis."""
        if axis.time is None:
            return axis.size // axis.repeat
        size = axis.outer * (self.new if axis.time == NEW else self.total) * axis.inner
        more = axis.before + axis.after + axis.shift
        return size + more if more else size


@dataclass(frozen=True)
class Value:
    """A tensor (batch)(time, if lifted) and then the axes without the batch's, (and 2 numbers, if complex)."""

    tensor: Tensor
    axes: tuple[Axis, ...]
    batched: bool = True  # False: of weights alone, the same for every row
    batch_axis: int | None = None  # which axis is the author's batch of one row
    lifted: bool = False  # the author cut it to the last position; it is computed for each
    complex: bool = False
    products: frozenset[Op] = frozenset()  # the q kᵀ that it comes from, while it has not met the values

    @property
    def local(self) -> bool:
        """Whether it is within what shifts rows."""
        return LOCAL in self.products

    @property
    def scores(self) -> frozenset[Op]:
        """The products that it comes from."""
        return self.products - {LOCAL}

    @property
    def lead(self) -> int:
        return int(self.batched) + int(self.lifted)

    def dim(self, axis: int) -> int:
        """Which axis of the tensor the author's one is."""
        assert axis != self.batch_axis
        return self.lead + axis - int(self.batch_axis is not None and self.batch_axis < axis)

    def time_axes(self, time: str) -> list[int]:
        return [i for i, axis in enumerate(self.axes) if axis.time == time]

    def with_(self, **changes: Any) -> Value:
        return dataclasses.replace(self, **changes)

    def explicit(self) -> Value:
        """The batch's axis of size 1 as one of the tensor."""
        if self.batch_axis is None:
            return self
        return self.with_(tensor=self.tensor.unsqueeze(self.lead + self.batch_axis), batch_axis=None)

    def real(self, which: Collection[int] | None = None) -> Value:
        """With expanded axes copied: all, or these."""
        value = self
        for i, axis in enumerate(self.axes):
            if which is not None and i not in which:
                continue
            if axis.repeat > 1:
                tensor = value.tensor
                if axis.repeat == axis.size:
                    sizes = list(tensor.shape)
                    sizes[value.dim(i)] = axis.size
                    tensor = tensor.expand(sizes)
                else:
                    tensor = tensor.repeat_interleave(axis.repeat, value.dim(i))
                axes = list(value.axes)
                axes[i] = Axis(axis.size)
                value = value.with_(tensor=tensor, axes=tuple(axes))
        return value

    def aligned(self, rank: int, batch_axis: int | None, lifted: bool) -> Tensor:
        """The tensor for a pointwise operator whose result has `rank` axes and the batch's at `batch_axis`."""
        missing = rank - len(self.axes)
        own = None if batch_axis is None else batch_axis - missing
        value, tensor = self, self.tensor
        if own != self.batch_axis:
            value = self.explicit()
            tensor = value.tensor
            if own is not None and own >= 0:
                assert value.axes[own].size == 1
                assert value.axes[own].time is None
                tensor = tensor.squeeze(value.lead + own)
        if not value.batched:
            return tensor
        if lifted and not self.lifted:
            tensor = tensor.unsqueeze(1)
        wanted = rank - int(batch_axis is not None) + 1 + int(lifted) + int(self.complex)
        while tensor.dim() < wanted:
            tensor = tensor.unsqueeze(1 + int(lifted))
        return tensor


def laid(tensor: Tensor, shape: Sequence[Size], times: Sequence[str | None]) -> Value:
    """A table as a value; complex numbers as pairs."""
    axes = tuple(Axis(1, time) if time else Axis(size.at(0)) for size, time in zip(shape, times, strict=True))
    pairs = tensor.is_complex()
    return Value(torch.view_as_real(tensor) if pairs else tensor, axes, batched=False, complex=pairs)

"""Tensors with labelled axes: the values that the operator rules read and write.

The module is traced on one row. The batch is a leading axis that the module does not see. A value only records where
the author's batch axis of size 1 is in a shape, so merged axes (B·T, B·H) need no special rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .program.program import Op, Size

LOCAL = Op("local", (), {}, (), None, "")  # in the products of a value whose rows are being shifted
NEW, KEY = "new", "key"  # rows of the new tokens; columns of all tokens, cached ones included


@dataclass(frozen=True)
class Axis:
    """One axis as the author sees it."""

    size: int  # of a time axis: outer · inner
    time: str | None = None  # NEW or KEY
    outer: int = 1  # a merged axis (outer, T, inner)
    inner: int = 1
    repeat: int = 1  # this many neighbours share one element of the tensor: an expanded axis, not yet copied
    before: int = 0  # extra columns in front of those of all tokens, such as an attention sink
    after: int = 0  # extra columns behind them
    shift: int = 0  # rows minus tokens, while operators shift the rows

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
    """The numbers of new tokens and of all tokens, as integers or as torch's symbolic ones."""

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
    """A tensor with the axes: batch if batched, time if lifted, `axes` without the batch axis, 2 if complex."""

    tensor: Tensor
    axes: tuple[Axis, ...]
    batched: bool = True  # False: depends on weights only, the same for every row of the batch
    batch_axis: int | None = None  # the index of the author's batch axis, of size 1
    lifted: bool = False  # the author selects the last position; every position is computed
    complex: bool = False
    products: frozenset[Op] = frozenset()  # the q kᵀ that it depends on, until it meets the values

    @property
    def local(self) -> bool:
        """Whether its rows are being shifted."""
        return LOCAL in self.products

    @property
    def scores(self) -> frozenset[Op]:
        """The products q kᵀ that it depends on."""
        return self.products - {LOCAL}

    @property
    def lead(self) -> int:
        return int(self.batched) + int(self.lifted)

    def dim(self, axis: int) -> int:
        """The tensor's axis for an axis of the author."""
        assert axis != self.batch_axis
        return self.lead + axis - int(self.batch_axis is not None and self.batch_axis < axis)

    def time_axes(self, time: str) -> list[int]:
        return [i for i, axis in enumerate(self.axes) if axis.time == time]

    def with_(self, **changes: Any) -> Value:
        return dataclasses.replace(self, **changes)

    def explicit(self) -> Value:
        """Makes the author's batch axis of size 1 an axis of the tensor."""
        if self.batch_axis is None:
            return self
        return self.with_(tensor=self.tensor.unsqueeze(self.lead + self.batch_axis), batch_axis=None)

    def real(self, which: Collection[int] | None = None) -> Value:
        """Copies expanded axes: all of them, or those in `which`."""
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
        """The tensor for a pointwise operator whose result has `rank` axes and its batch axis at `batch_axis`."""
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
    """A table as a value, with complex numbers as pairs."""
    axes = tuple(Axis(1, time) if time else Axis(size.at(0)) for size, time in zip(shape, times, strict=True))
    pairs = tensor.is_complex()
    return Value(torch.view_as_real(tensor.resolve_conj()) if pairs else tensor, axes, batched=False, complex=pairs)

"""Operators that select, join or write parts of a tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...probe.causes import Kind
from ..program.program import Op, Size
from ..values import KEY, NEW, Axis, Value
from .base import Refused, aten, expanded
from .shapes import Shapes


class Parts(Shapes):
    """Slices, concatenations, lookups and writes."""

    def _slice(self, op: Op, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
        dim %= len(x.axes)
        axis = x.axes[dim]
        if axis.time is None:
            if x.axes[dim].size == 1 and op.shape[dim] == Size(0, 1):
                return x
            if dim == x.batch_axis:
                raise Refused(op, "reads a part of the batch")
            x = x.real([dim])
            sizes = [s.at(0) if isinstance(s, Size) else s for s in (start, end)]
            tensor = aten.slice.Tensor(x.tensor, x.dim(dim), sizes[0], sizes[1], step)
            return self._with_axis(x, dim, Axis(op.shape[dim].at(0)), tensor)
        if (
            op.shape[dim] == Size(axis.outer * axis.inner, 0)
            and step == 1
            and not (axis.before or axis.after or axis.shift)
        ):
            return x
        if op.shape[dim] == Size(0, 1) and _last(start) and axis.time == NEW and axis.plain_time:
            lifted = self._lift(op, x, dim)
            return lifted.with_(
                tensor=lifted.tensor.unsqueeze(
                    lifted.lead + dim - int(x.batch_axis is not None and x.batch_axis < dim)
                ),
                axes=(*lifted.axes[:dim], Axis(1), *lifted.axes[dim:]),
                batch_axis=x.batch_axis,
            )
        if axis.time == KEY and (axis.before or axis.after) and step == 1:
            return self._without_sinks(op, x, dim, start, end)
        if self.shifts and axis.time == NEW and axis.outer == axis.inner == 1 and step == 1:
            length = self.lengths.new
            bounds = [bound.at(length) if isinstance(bound, Size) else bound for bound in (start, end)]
            return self.shifted(op, x, dim, aten.slice.Tensor(x.tensor, x.dim(dim), *bounds))
        raise Refused(op, "reads a part of the positions")

    def _without_sinks(self, op: Op, x: Value, dim: int, start: Any, end: Any) -> Value:
        axis = x.axes[dim]
        first = start or 0
        if isinstance(end, Size):
            last = axis.before + axis.after - end.b if end.a == 1 else -1
        else:
            last = -end if isinstance(end, int) and end < 0 else 0
        if not isinstance(first, int) or first < 0 or not 0 <= last <= axis.after or first > axis.before:
            raise Refused(op, "reads a part of the positions")
        at = x.dim(dim)
        length = self.lengths.total + axis.before + axis.after - first - last
        new = dataclasses.replace(axis, before=axis.before - first, after=axis.after - last)
        return self._with_axis(x, dim, new, x.tensor.narrow(at, first, length))

    def _narrow(self, op: Op, x: Value, dim: int, start: Any, length: Any) -> Value:
        end = start + length if isinstance(start, int) and isinstance(length, int) else None
        return self._slice(op, x, dim, start, end)

    def _select(self, op: Op, x: Value, dim: int, index: Any) -> Value:
        dim %= len(x.axes)
        if x.axes[dim].time is not None:
            if _last(index) and x.axes[dim].time == NEW and x.axes[dim].plain_time:
                return self._lift(op, x, dim)
            raise Refused(op, "reads one position out of all")
        if dim == x.batch_axis:
            return x.with_(axes=(*x.axes[:dim], *x.axes[dim + 1 :]), batch_axis=None)
        x = x.real()
        batch = None if x.batch_axis is None else x.batch_axis - int(dim < x.batch_axis)
        number = index.at(0) if isinstance(index, Size) else index
        return x.with_(
            tensor=x.tensor.select(x.dim(dim), number), axes=(*x.axes[:dim], *x.axes[dim + 1 :]), batch_axis=batch
        )

    def _lift(self, op: Op, x: Value, dim: int) -> Value:
        """Handles a selection of the last position: computes every position as if it were the last."""
        if x.scores or x.lifted:
            raise Refused(op, "reads one position out of all")
        batch = None if x.batch_axis is None else x.batch_axis - int(dim < x.batch_axis)
        tensor = x.tensor.movedim(x.dim(dim), 1)
        return x.with_(tensor=tensor, axes=(*x.axes[:dim], *x.axes[dim + 1 :]), batch_axis=batch, lifted=True)

    def _with_axis(self, x: Value, dim: int, axis: Axis, tensor: Tensor) -> Value:
        axes = list(x.axes)
        axes[dim] = axis
        return x.with_(tensor=tensor, axes=tuple(axes))

    def _split(self, op: Op, x: Value, size: Any, dim: int = 0) -> list[Value]:
        dim %= len(x.axes)
        if x.axes[dim].time is not None or dim == x.batch_axis:
            raise Refused(op, "splits the positions")
        x = x.real()
        parts = x.tensor.split(size, x.dim(dim)) if op.name != "chunk" else x.tensor.chunk(size, x.dim(dim))
        return [self._with_axis(x, dim, Axis(int(p.shape[x.dim(dim)])), p) for p in parts]

    _split_with_sizes = _chunk = _split

    def _unbind(self, op: Op, x: Value, dim: int = 0) -> list[Value]:
        dim %= len(x.axes)
        if x.axes[dim].time is not None:
            raise Refused(op, "goes over the positions one by one", Kind.RECURRENCE)
        return [self._select(op, x, dim, i) for i in range(x.axes[dim].size)]

    def _cat(self, op: Op, parts: Sequence[Value | Op], dim: int = 0) -> Value:
        rank = len(op.shape)
        dim %= rank
        some = [p for p in parts if not _is_empty(p, dim)]
        if len(some) == 1:
            return self._value(op, some[0])
        times = self._times([p for p in some if isinstance(p, Value)], rank, op)
        values = [self.lay(op, p, times) if isinstance(p, Op) else p for p in some]
        moving = [i for i, v in enumerate(values) if v.axes[dim].time]
        if len(moving) == 1 and values[moving[0]].axes[dim].time == KEY:  # a sink next to the scores
            return self._beside_keys(op, values, dim, moving[0])
        if moving and self.shifts:
            joined = self._joined(op, values, dim)
            return self.shifted(op, joined, dim, joined.tensor)
        if moving:
            raise Refused(op, "joins rows of positions")
        return self._joined(op, values, dim)

    _concat = _concatenate = _cat

    def _beside_keys(self, op: Op, values: Sequence[Value], dim: int, at: int) -> Value:
        axis = values[at].axes[dim]
        before = sum(v.axes[dim].size for v in values[:at]) + axis.before
        after = sum(v.axes[dim].size for v in values[at + 1 :]) + axis.after
        joined = self._joined(op, values, dim)
        return self._with_axis(joined, dim, dataclasses.replace(axis, before=before, after=after), joined.tensor)

    def _stack(self, op: Op, parts: Sequence[Value | Op], dim: int = 0) -> Value:
        dim %= len(op.shape)
        rank = len(op.shape) - 1
        times = self._times([p for p in parts if isinstance(p, Value)], rank, op)
        values = [self.lay(op, p, times) if isinstance(p, Op) else p for p in parts]
        return self._joined(op, [self._unsqueeze(op, v.explicit() if dim == 0 else v, dim) for v in values], dim)

    def _joined(self, op: Op, values: Sequence[Value], dim: int) -> Value:
        rank = len(op.shape)
        batched, lifted = any(v.batched for v in values), any(v.lifted for v in values)
        batch = self._batch_axis(values, rank)
        if batch == dim or (batched and not all(v.batched for v in values)):
            batch = None if batch == dim else batch
        values = self._alike(values, rank, dim)
        tensors = [v.aligned(rank, batch, lifted) for v in values]
        widest = max((t for t in tensors), key=lambda t: t.dim())
        at = int(batched) + int(lifted) + dim - int(batch is not None and batch < dim)
        tensors = [expanded(t, widest, at) for t in tensors]
        times = self._times(values, rank, op)
        axes = list(self._out_axes(op, values, times))
        axes[dim] = Axis(op.shape[dim].b)
        products = frozenset().union(*(v.products for v in values))
        return Value(
            torch.cat(tensors, at), tuple(axes), batched, batch, lifted, any(v.complex for v in values), products
        )

    def _embedding(self, op: Op, weight: Value | Op, ids: Value | Op, *_: Any) -> Value:
        ids = self._value(op, ids)
        if not isinstance(weight, Value) or weight.batched or weight.time_axes(NEW):
            raise Refused(op, "looks numbers up in a table made of the tokens")
        ids = ids.real()
        axes = (*ids.axes, *weight.axes[1:])
        table = weight.tensor
        found = F.embedding(ids.tensor, table if table.dim() == 2 else table.reshape(len(table), -1))
        if table.dim() != 2:
            found = found.reshape(*ids.tensor.shape, *table.shape[1:])
        return ids.with_(tensor=found, axes=axes)

    def _index(self, op: Op, x: Value | Op, indices: Sequence[Value | Op | None]) -> Value:
        at = [i for i, index in enumerate(indices) if index is not None]
        if isinstance(x, Value) and x.batched and len(at) == 1 and not isinstance(indices[at[0]], Op):
            index = indices[at[0]]
            assert isinstance(index, Value)
            axis = x.axes[at[0]]
            if not index.batched and axis.time is None and at[0] != x.batch_axis and len(index.axes) == 1:
                x = x.real()
                tensor = x.tensor.index_select(x.dim(at[0]), index.tensor % axis.size)  # an index may be negative
                return self._with_axis(x, at[0], Axis(index.axes[0].size), tensor)
            if axis.time == NEW and not index.batched and _is_last(op, index, at[0]):
                if not index.axes:
                    return self._select(op, x, at[0], -1)
                return self._slice(op, x, at[0], -1)
        if isinstance(x, Value) and not x.batched and len(at) == 1 and at[0] == 0 and not x.time_axes(NEW):
            index = self._value(op, indices[0])
            return self._embedding(op, x, index)
        raise Refused(op, "picks positions by an index")

    def _index_select(self, op: Op, x: Value | Op, dim: int, index: Value | Op) -> Value:
        where: list[Any] = [None] * (dim % len(op.shape))
        return self._index(op, x, [*where, index])

    def _gather(self, op: Op, x: Value, dim: int, index: Value | Op, **_: Any) -> Value:
        index = self._value(op, index).real()
        x = x.real()
        dim %= len(x.axes)
        if x.axes[dim].time or index.axes[dim].time:
            raise Refused(op, "picks positions by an index")
        rank = len(op.shape)
        batch = self._batch_axis([x, index], rank)
        tensors = [v.aligned(rank, batch, x.lifted or index.lifted) for v in (x, index)]
        place = x.lead + dim - int(batch is not None and batch < dim)
        return index.with_(tensor=torch.gather(tensors[0], place, tensors[1]), batch_axis=batch)

    def _scatter(self, op: Op, x: Value, dim: int, index: Value, source: Any, **_: Any) -> Value:
        dim %= len(x.axes)
        if any(v.axes[dim].time for v in (x, index)):
            raise Refused(op, "writes positions by an index")
        values = [v.real() for v in (x, index, *([source] if isinstance(source, Value) else []))]
        rank = len(op.shape)
        batch = self._batch_axis(values, rank)
        tensors = [v.aligned(rank, batch, v.lifted) for v in values]
        place = 1 + int(x.lifted or index.lifted) + dim - int(batch is not None and batch < dim)
        tensors[0] = expanded(tensors[0], tensors[1], place)
        given = tensors[2] if isinstance(source, Value) else source
        return index.with_(
            tensor=tensors[0].scatter(place, tensors[1], given),
            axes=tuple(
                Axis(s.at(0)) if i == dim else a for i, (a, s) in enumerate(zip(index.axes, op.shape, strict=True))
            ),
            batch_axis=batch,
        )

    def _index_put(self, op: Op, x: Value, indices: Sequence[Any], value: Any, accumulate: bool = False) -> Value:
        """Writes one number at indices that are tables: a masked fill."""
        places = [i for i in op.args[1] if i is not None]
        if any(i.depends for i in places) or accumulate or not isinstance(value, Value) or value.axes:
            raise Refused(op, "writes positions by an index")
        if op.helper is None:
            where, shape = op.args[1], op.shape

            def marked(sizes: Sequence[int], *given: Tensor) -> Tensor:
                found = iter(given)
                at = [None if i is None else next(found) for i in where]
                mask: Tensor = aten.index_put(torch.zeros(sizes, dtype=torch.bool), at, torch.tensor(True))
                return mask

            op.helper = Op(marked, (list(shape), *places), {}, op.shapes, torch.bool, op.where)
        masked = Op(aten.masked_fill.Tensor, op.args, {}, op.shapes, op.dtype, op.where)
        return self._pointwise(masked, x, op.helper, value)

    def _one_hot(self, op: Op, x: Value, count: int = -1) -> Value:
        tensor = (x.tensor.unsqueeze(-1) == torch.arange(count)).to(torch.int64)
        return x.with_(tensor=tensor, axes=(*x.axes, Axis(count)))

    def _slice_scatter(
        self, op: Op, x: Value, source: Value | Op, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
    ) -> Value:
        source = self._value(op, source)
        rank = len(op.shape)
        dim %= rank
        if x.axes[dim].time or source.axes[dim].time:
            if op.shape[dim] == Size(1, 0) and source.axes[dim].time and start in (None, 0, Size(-1, 0)) and step == 1:
                return source
            if self.shifts and x.batched and step == 1:
                length = self.lengths.new
                bounds = tuple(bound.at(length) if isinstance(bound, Size) else bound for bound in (start, end))
                whole = x.axes[dim]
                written = self._written(op, aten.slice_scatter.default, x, source, dim, (*bounds, step), rank)
                return self.shifted(op, self._with_axis(written, dim, whole, written.tensor), dim, written.tensor)
            raise Refused(op, "writes into a part of the positions")
        return self._written(op, aten.slice_scatter.default, x, source, dim, (start, end, step), rank)

    def _select_scatter(self, op: Op, x: Value, source: Value | Op, dim: int, index: Any) -> Value:
        source = self._value(op, source)
        dim %= len(op.shape)
        if x.axes[dim].time:
            raise Refused(op, "writes into one position")
        source = self._unsqueeze(
            op, source.explicit() if source.batch_axis is not None and source.batch_axis >= dim else source, dim
        )
        number = index.at(0) if isinstance(index, Size) else index
        if number < 0:
            number += op.shape[dim].at(0)
        return self._written(op, aten.slice_scatter.default, x, source, dim, (number, number + 1, 1), len(op.shape))

    def _written(
        self, op: Op, target: Any, x: Value, source: Value, dim: int, where: tuple[Any, ...], rank: int
    ) -> Value:
        values = [x.real(), source.real()]
        batched, lifted = any(v.batched for v in values), any(v.lifted for v in values)
        batch = self._batch_axis(values, rank)
        tensors = [v.aligned(rank, batch, lifted) for v in values]
        place = int(batched) + int(lifted) + dim - int(batch is not None and batch < dim)
        tensors[0] = expanded(tensors[0], max(tensors, key=lambda t: t.dim()), place)
        if not x.batched and source.batched and tensors[0].dim() == tensors[1].dim() - 1:
            tensors[0] = tensors[0][None].expand(tensors[1].shape[0], *tensors[0].shape)
        times = self._times(values, rank, op)
        axes = list(self._out_axes(op, values, times))
        axes[dim] = Axis(op.shape[dim].at(0))
        products = x.products | source.products
        return Value(
            target(tensors[0], tensors[1], place, *where), tuple(axes), batched, batch, lifted, False, products
        )


def _last(index: Any) -> bool:
    return index in (-1, Size(1, -1))


def _is_empty(part: Value | Op, dim: int) -> bool:
    """Whether it has no rows, such as a cache without earlier tokens."""
    if isinstance(part, Op):
        return dim >= len(part.shape) or part.shape[dim] == Size(0, 0)
    return dim >= len(part.axes) or (part.axes[dim].time is None and part.axes[dim].size == 0)


def _is_last(op: Op, index: Value, axis: int) -> bool:
    """Whether an index tensor is [-1]."""
    return index.tensor.numel() == 1 and not index.tensor.is_floating_point() and int(_concrete(op, axis)) == -1


def _concrete(op: Op, axis: int) -> int:
    source = op.args[1][axis]
    while source.constant is None and source.inputs:
        source = source.inputs[0]
    return -2 if source.constant is None or source.constant.numel() != 1 else int(source.constant)

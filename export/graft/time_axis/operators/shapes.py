"""Operators that reorder or reshape axes: views, permutations, expansions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ..program.program import LengthNumber, Op, Size
from ..values import Axis, Value
from .base import Operators, Refused


class Shapes(Operators):
    """Views, permutations and expansions."""

    def _view(self, op: Op, x: Value, *_: Any, **__: Any) -> Value:
        axes = tuple(_factors(op, x, op.shape))
        batch = self._batch_after(x, op.shape)
        if math.prod(a.repeat for a in x.axes) != math.prod(a.repeat for a in axes):  # the view needs a copy
            x = x.real()
            axes = tuple(_factors(op, x, op.shape))
        body = [axis for i, axis in enumerate(axes) if i != batch]
        before = [axis for i, axis in enumerate(x.axes) if i != x.batch_axis]
        tensor = x.tensor
        if [(a.size, a.time, a.outer, a.inner, a.repeat) for a in body] != [
            (a.size, a.time, a.outer, a.inner, a.repeat) for a in before
        ]:
            sizes = [*tensor.shape[: x.lead], *(self.lengths.of(axis) for axis in body)]
            tensor = tensor.reshape(sizes + ([2] if x.complex else []))
        return x.with_(tensor=tensor, axes=axes, batch_axis=batch)

    _reshape = _unsafe_view = _flatten = _unflatten = _view_copy = _view

    def _batch_after(self, x: Value, shape: Sequence[Size]) -> int | None:
        """The axis of size 1 that becomes the batch axis; any of them may be it."""
        if not x.batched:
            return None
        ones = [i for i, size in enumerate(shape) if size == Size(0, 1)]
        own = sum(1 for i, a in enumerate(x.axes) if i != x.batch_axis and a.size == 1 and a.time is None)
        if x.batch_axis is None or len(ones) <= own:
            return 0 if 0 in ones and len(ones) > own else None
        if 0 in ones:
            return 0
        return x.batch_axis if x.batch_axis in ones else ones[0]

    def _permuted(self, x: Value, order: Sequence[int]) -> Value:
        batch = None if x.batch_axis is None else order.index(x.batch_axis)
        physical = [x.dim(i) for i in order if i != x.batch_axis]
        tensor = x.tensor
        if physical != sorted(physical):
            tail = [tensor.dim() - 1] if x.complex else []
            tensor = tensor.permute([*range(x.lead), *physical, *tail])
        return x.with_(tensor=tensor, axes=tuple(x.axes[i] for i in order), batch_axis=batch)

    def _permute(self, op: Op, x: Value, dims: Sequence[int]) -> Value:
        return self._permuted(x, [d % len(x.axes) for d in dims])

    def _transpose(self, op: Op, x: Value, a: int, b: int) -> Value:
        order = list(range(len(x.axes)))
        a, b = a % len(order), b % len(order)
        order[a], order[b] = order[b], order[a]
        return self._permuted(x, order)

    _swapaxes = _swapdims = _transpose

    def _t(self, op: Op, x: Value) -> Value:
        return self._permuted(x, list(range(len(x.axes)))[::-1])

    _numpy_T = _t

    def _mT(self, op: Op, x: Value) -> Value:
        return self._transpose(op, x, -2, -1)

    _adjoint = _matrix_H = _mT

    def _movedim(self, op: Op, x: Value, source: Any, to: Any) -> Value:
        rank = len(x.axes)
        pairs = [(source, to)] if isinstance(source, int) else list(zip(source, to, strict=True))
        moved = {b % rank: a % rank for a, b in pairs}
        rest = iter(i for i in range(rank) if i not in moved.values())
        return self._permuted(x, [moved[i] if i in moved else next(rest) for i in range(rank)])

    def _unsqueeze(self, op: Op, x: Value, dim: int) -> Value:
        dim %= len(x.axes) + 1
        axes = (*x.axes[:dim], Axis(1), *x.axes[dim:])
        if x.batched and x.batch_axis is None and dim == 0:  # probably the batch axis
            return x.with_(axes=axes, batch_axis=0)
        batch = None if x.batch_axis is None else x.batch_axis + int(dim <= x.batch_axis)
        at = x.lead + dim - int(x.batch_axis is not None and x.batch_axis < dim)
        return x.with_(tensor=x.tensor.unsqueeze(at), axes=axes, batch_axis=batch)

    def _squeeze(self, op: Op, x: Value, dims: Any = None) -> Value:
        wanted = range(len(x.axes)) if dims is None else [dims] if isinstance(dims, int) else dims
        for dim in sorted({d % len(x.axes) for d in wanted}, reverse=True):
            if x.axes[dim].size != 1 or x.axes[dim].time is not None:
                continue
            axes = (*x.axes[:dim], *x.axes[dim + 1 :])
            if dim == x.batch_axis:
                x = x.with_(axes=axes, batch_axis=None)
            else:
                batch = None if x.batch_axis is None else x.batch_axis - int(dim < x.batch_axis)
                x = x.with_(tensor=x.tensor.squeeze(x.dim(dim)), axes=axes, batch_axis=batch)
        return x

    def _expand(self, op: Op, x: Value, sizes: Sequence[Any], **_: Any) -> Value:
        while len(x.axes) < len(op.shape):
            x = self._unsqueeze(op, x.explicit() if x.batch_axis == 0 else x, 0)
        axes = list(x.axes)
        batch = x.batch_axis
        if batch is not None and op.shape[batch] != Size(0, 1):
            x, batch = x.explicit(), None
        for i, (axis, size) in enumerate(zip(x.axes, op.shape, strict=True)):
            if axis.time is not None or (axis.size == size.at(0) and not size.moves):
                continue
            if size.moves:
                if not x.lifted:
                    continue  # the same for every token: size 1 broadcasts
                continue
            axes[i] = Axis(size.at(0), repeat=size.at(0))
        return x.with_(axes=tuple(axes))

    _broadcast_to = _expand

    def _repeat_interleave(self, op: Op, x: Value, repeats: int, dim: int | None = None, **_: Any) -> Value:
        if dim is None or not isinstance(repeats, int):
            raise Refused(op, "repeats numbers by a tensor of counts")
        dim %= len(x.axes)
        axis = x.axes[dim]
        axes = list(x.axes)
        if axis.time is not None:
            if axis.before or axis.after or axis.shift:
                raise Refused(op, "repeats positions")
            axes[dim] = dataclasses.replace(axis, size=axis.size * repeats, inner=axis.inner * repeats)
            return x.with_(tensor=x.tensor.repeat_interleave(repeats, x.dim(dim)), axes=tuple(axes))
        if dim == x.batch_axis:
            x, axes = x.explicit(), list(x.axes)
        axes[dim] = Axis(axis.size * repeats, repeat=axis.repeat * repeats)
        return x.with_(axes=tuple(axes))

    def _repeat(self, op: Op, x: Value, counts: Sequence[Any]) -> Value:
        x = self._expand(op, x, ()) if len(counts) == len(x.axes) and all(c == 1 for c in counts) else x
        while len(x.axes) < len(counts):
            x = self._unsqueeze(op, x.explicit() if x.batch_axis == 0 else x, 0)
        for i, count in enumerate(counts):
            axis = x.axes[i]
            if count == 1 or (isinstance(count, Size) and axis.size == 1 and axis.time is None):
                continue
            if axis.time is not None or isinstance(count, Size | LengthNumber):
                raise Refused(op, "repeats positions")
            if i == x.batch_axis:
                x = x.explicit()
            axes = list(x.axes)
            if axis.size == 1:
                axes[i] = Axis(count, repeat=count)
                x = x.with_(axes=tuple(axes))
            else:
                x = x.real()
                times = [1] * x.tensor.dim()
                times[x.dim(i)] = count
                axes[i] = Axis(axis.size * count)
                x = x.with_(tensor=x.tensor.repeat(times), axes=tuple(axes))
        return x

    _tile = _repeat


def _factors(op: Op, x: Value, shape: Sequence[Size]) -> list[Axis]:
    """The axes after a view, by equal products of sizes. A time axis may merge with its neighbours and split again."""
    ins = [(axis, i) for i, axis in enumerate(x.axes)]
    outs: list[Axis] = []
    i = j = 0

    def moved(axis: Axis) -> Size:
        return Size(axis.outer * axis.inner, axis.shift) if axis.time is not None else Size(0, axis.size)

    while i < len(ins) or j < len(shape):
        group: list[Axis] = []
        targets: list[Size] = []
        left, right = Size(0, 1), Size(0, 1)
        while True:
            if group and targets and left == right:
                break
            take_in = i < len(ins) and (not group or _smaller(left, right) or j >= len(shape))
            if take_in:
                group.append(ins[i][0])
                left = _times(op, left, moved(ins[i][0]))
                i += 1
            elif j < len(shape):
                targets.append(shape[j])
                right = _times(op, right, shape[j])
                j += 1
            elif left == right:
                break
            else:
                raise Refused(op, "views the positions in a way that cannot be followed")
        outs.extend(_regrouped(op, group, targets))
    return outs


def _smaller(a: Size, b: Size) -> bool:
    return bool(a.at(10007) < b.at(10007))


def _times(op: Op, a: Size, b: Size) -> Size:
    if a.a and b.a:
        raise Refused(op, "merges two axes of positions")
    if Size(0, 1) in (a, b):
        return b if a == Size(0, 1) else a
    if isinstance(b, LengthNumber) or (a.a and a.b) or (b.a and b.b):
        raise Refused(op, "views the positions in a way that cannot be followed")
    return Size(a.a * b.b + b.a * a.b, a.b * b.b)


def _regrouped(op: Op, group: Sequence[Axis], targets: Sequence[Size]) -> list[Axis]:
    times = [axis for axis in group if axis.time is not None]
    if not times:
        return _repeated(group, targets)
    if any(axis.repeat > 1 for axis in group):
        raise Refused(op, "merges positions with an expanded axis")
    at = group.index(times[0])
    outer = math.prod(axis.size for axis in group[:at]) * times[0].outer
    inner = math.prod(axis.size for axis in group[at + 1 :]) * times[0].inner
    moving = [k for k, size in enumerate(targets) if size.a]
    if len(moving) != 1:
        raise Refused(op, "views the positions in a way that cannot be followed")
    k = moving[0]
    if times[0].shift:  # a shifted axis cannot merge
        return [times[0] if m == k else Axis(size.b) for m, size in enumerate(targets)]
    before, after = math.prod(s.b for s in targets[:k]), math.prod(s.b for s in targets[k + 1 :])
    if outer % before or inner % after:
        raise Refused(op, "views the positions in a way that cannot be followed")
    axis = Axis(outer // before * inner // after, times[0].time, outer // before, inner // after)
    return [axis if m == k else Axis(size.b) for m, size in enumerate(targets)]


def _repeated(group: Sequence[Axis], targets: Sequence[Size]) -> list[Axis]:
    """Axes without time. An expanded axis that merges as the innermost one needs no copy."""
    repeat = math.prod(axis.repeat for axis in group)
    if repeat == 1 or any(size.moves for size in targets):
        return [Axis(size.at(0)) for size in targets]
    real = [axis for axis in group if axis.size > 1]
    wide = [Axis(size.at(0)) for size in targets]
    if len([s for s in targets if s.at(0) > 1]) == len(real):  # only axes of size 1 are added or removed
        it = iter(real)
        return [next(it) if size.at(0) > 1 else Axis(1) for size in targets]
    inner = real[len(real) - 1]
    if all(axis.repeat == 1 for axis in real[:-1]) and inner.repeat == inner.size:
        big = [k for k, size in enumerate(targets) if size.at(0) > 1]
        if len(big) == 1:
            wide[big[0]] = Axis(wide[big[0]].size, repeat=inner.repeat)
    return wide

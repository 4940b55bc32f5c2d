"""Shared parts of all operator rules: tables with values, pointwise operators, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...probe.causes import Cause, Kind, ObstacleError
from ..program.program import LengthNumber, Op, Size
from ..values import KEY, LOCAL, NEW, Axis, Lengths, Value

aten = torch.ops.aten


class Refused(ObstacleError):
    """Refuses an operator, with the cause."""

    def __init__(self, op: Op, what: str, kind: Kind = Kind.UNKNOWN) -> None:
        super().__init__(Cause(kind, what, op.where, op.owner))
        self.op = op


class Unknown(Refused):
    """An operator that has no rule."""


class Swapped(Exception):
    """The rows of a product are the keys, and its columns the queries."""

    def __init__(self, op: Op, products: frozenset[Op]) -> None:
        super().__init__()
        self.op = op
        self.products = products


Contraction = tuple[str, str, str]  # einsum letters, one per axis, of both operands and the result


class Operators:
    """Runs operators on values. Subclasses define tables, products and sums of weighted values."""

    def __init__(self, lengths: Lengths) -> None:
        self.lengths = lengths
        self.swapped: set[Op] = set()
        self.shifts = False  # whether rows may be shifted: on a whole sequence, or on its last rows

    # --- the differences between the runs
    def table(self, op: Op, times: Sequence[str | None]) -> Value:
        """A table as a value; each time axis is NEW (rows) or KEY (columns)."""
        raise NotImplementedError

    def product(self, op: Op, a: Value, b: Value, letters: Contraction) -> Value:
        raise NotImplementedError

    def weighted(self, op: Op, weights: Value | Op, values: Value, letters: Contraction) -> Value:
        raise NotImplementedError

    def shifted(self, op: Op, x: Value, dim: int, tensor: Tensor) -> Value:
        """A value with the rows of x moved along the axis `dim`."""
        size = op.shape[dim]
        if isinstance(size, LengthNumber) or size.a not in (0, 1):
            raise Refused(op, "reads a part of the positions")
        axes = list(x.axes)
        axes[dim] = Axis(1, NEW, shift=size.b) if size.a else Axis(size.b)
        return x.with_(tensor=tensor, axes=tuple(axes), products=x.products | {LOCAL})

    def lay(self, op: Op, table: Op, out: Sequence[str | None]) -> Value:
        """Aligns a table with a value whose axes have the times `out`, from the right."""
        times: list[str | None] = []
        shift = len(out) - len(table.shape)
        for i, size in enumerate(table.shape):
            if not size.moves:
                times.append(None)
                continue
            if isinstance(size, Size) and size.a == 1 and size.b > 0:
                raise Refused(op, in_front(size.b))
            if size != Size(1, 0):
                raise Refused(op, f"needs a table of {_shown(size)} rows at once")
            times.append((out[i + shift] if i + shift >= 0 else None) or KEY)
        return self.table(table, times)

    # --- pointwise
    def _pointwise(self, op: Op, *args: Any, **kwargs: Any) -> Value:
        flat = [a for a in (*args, *kwargs.values()) if isinstance(a, Value | Op)]
        if any(isinstance(a, Size | LengthNumber) for a in (*args, *kwargs.values())):
            raise Refused(op, "computes with a number made from the length of the text", Kind.LENGTH)
        rank = len(op.shape)
        times = self._times([a for a in flat if isinstance(a, Value)], rank, op)
        values = {id(a): self.lay(op, a, times) if isinstance(a, Op) else a for a in flat}
        operands = list(values.values())
        times = self._times(operands, rank, op)
        if KEY not in times and len({bool(v.scores) for v in operands if v.batched}) == 2:
            raise Refused(
                op,
                "divides by the sum of attention weights after they met the values: divide the weights, before they do",
            )
        operands_real = dict(zip(values, self._alike(operands, rank), strict=True))
        operands = list(operands_real.values())
        batched, lifted = any(v.batched for v in operands), any(v.lifted for v in operands)
        batch_axis = self._batch_axis(operands, rank)
        complex_ = any(v.complex for v in operands)

        def tensor(a: Any) -> Any:
            if not isinstance(a, Value | Op):
                return a
            value = operands_real[id(a)]
            found = value.aligned(rank, batch_axis, lifted)
            return found.unsqueeze(-1) if complex_ and not value.complex else found

        if complex_:
            result = _complex(op, [tensor(a) for a in args], [operands_real[id(a)].complex for a in args])
        else:
            given = [tensor(a) for a in args]
            if op.name in ("clone", "contiguous", "alias", "detach", "lift_fresh_copy", "dropout", "feature_dropout"):
                result = given[0]
            elif op.name == "copy":  # the source may have a batch axis that the target lacks
                result = torch.broadcast_tensors(*given[:2])[1].to(op.dtype)
            else:
                result = op.target(*given, **{k: tensor(v) for k, v in kwargs.items() if k != "memory_format"})
        axes = self._out_axes(op, operands, times)
        products = frozenset().union(*(v.products for v in operands))
        return Value(result, axes, batched, batch_axis, lifted, complex_, products)

    def _times(self, values: Sequence[Value], rank: int, op: Op) -> list[str | None]:
        times: list[str | None] = [None] * rank
        for value in values:
            for i, axis in enumerate(value.axes):
                at = rank - len(value.axes) + i
                if axis.time is None:
                    continue
                if times[at] not in (None, axis.time):
                    raise Refused(
                        op, "joins numbers of earlier tokens with the scores of attention, which no cache holds"
                    )
                times[at] = axis.time
        if times.count(NEW) > 1:
            raise Refused(op, "compares every token with every other one, and not by a product of queries and keys")
        return times

    def _alike(self, values: Sequence[Value], rank: int, but: int | None = None) -> list[Value]:
        """Copies expanded axes: `but`, and each axis whose repeat differs between the values.

        An axis that repeats one element broadcasts; it is copied only if the values are joined along `but`.
        """
        copied = {but}
        for at in range(rank):
            axes = [v.axes[at - rank + len(v.axes)] for v in values if at - rank + len(v.axes) >= 0]
            kinds = {a.repeat for a in axes if a.size > (1 if but is not None else a.repeat)}
            if len(kinds) > 1:
                copied.add(at)
        return [v.real([at - rank + len(v.axes) for at in copied if at is not None]) for v in values]

    def _batch_axis(self, values: Sequence[Value], rank: int) -> int | None:
        found = {rank - len(v.axes) + v.batch_axis for v in values if v.batch_axis is not None}
        if len(found) != 1:
            return None
        (axis,) = found
        for v in values:
            own = axis - (rank - len(v.axes))
            if own >= 0 and v.batch_axis != own and (v.axes[own].size != 1 or v.axes[own].time is not None):
                return None
            if v.batched and v.batch_axis is None and own < 0 and rank - len(v.axes) > 0:
                continue
        return axis

    def _out_axes(self, op: Op, values: Sequence[Value], times: Sequence[str | None]) -> tuple[Axis, ...]:
        rank, axes = len(op.shape), []
        for at, size in enumerate(op.shape):
            time = times[at]
            sources = [v.axes[at - rank + len(v.axes)] for v in values if at - rank + len(v.axes) >= 0]
            if time is not None:
                source = next(a for a in sources if a.time == time)
                axes.append(source)
                continue
            number = size.at(0)
            axes.append(Axis(number, repeat=min((a.repeat for a in sources if a.size == number), default=1)))
        if any(v.lifted for v in values):
            axes = [
                Axis(1) if axis.time is None and size.moves else axis for axis, size in zip(axes, op.shape, strict=True)
            ]
        return tuple(axes)

    def lay_exactly(self, op: Op, table: Op, times: Sequence[str | None]) -> Value:
        if any(size.moves and size != Size(1, 0) for size in table.shape):
            raise Refused(op, "needs a table of another length than the text's")
        return self.table(table, times)

    def _value(self, op: Op, x: Any) -> Value:
        """A table as a single operand: a time axis holds rows, the last of two time axes holds columns."""
        if isinstance(x, Value):
            return x
        assert isinstance(x, Op)
        times = [i for i, size in enumerate(x.shape) if size.moves]
        if len(times) > 2:
            raise Refused(op, "needs a table with three axes of the length")
        return self.lay_exactly(
            op,
            x,
            [(KEY if i == times[-1] and len(times) == 2 else NEW) if i in times else None for i in range(len(x.shape))],
        )


# --- helpers ------------------------------------------------------------------------------------------------------
def _shown(size: Size | LengthNumber) -> str:
    return f"{size.a}·T{size.b:+d}" if isinstance(size, Size) else "another number of"


def in_front(count: int) -> str:
    """The cause for a module whose attention has more rows than the text has tokens."""
    rows = "a row" if count == 1 else f"{count} rows"
    return f"has {rows} more than the text has tokens (a learned token, or learned keys and values), not in the cache"


_RUNNING = {"cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"}


def over_time(op: Op, name: str) -> Refused:
    """The refusal of an operator that works along the positions."""
    if name in _RUNNING:
        return Refused(op, f"computes {name} over earlier positions (a running sum or the like)", Kind.RECURRENCE)
    known = {
        "flip": "turns the positions around, so that a token sees later ones",
        "mean": "averages over all positions, including later ones",
        "normalizes": "normalizes over all positions, including later ones",
        "sum": "sums over all positions, including later ones",
    }
    return Refused(
        op, known.get(name, f"computes {name.strip('_')} over all positions, including later ones"), Kind.LOOK_AHEAD
    )


def expanded(tensor: Tensor, like: Tensor, but: int) -> Tensor:
    """Expands a tensor to the sizes of `like` along every axis except `but`."""
    while tensor.dim() < like.dim():
        tensor = tensor.unsqueeze(0)
    sizes = [tensor.shape[i] if i == but else like.shape[i] for i in range(like.dim())]
    return tensor.expand(sizes)


def _complex(op: Op, tensors: Sequence[Tensor], pairs: Sequence[bool]) -> Tensor:
    name = op.name
    if name == "mul" and all(pairs):
        a, b = tensors
        real = a[..., 0] * b[..., 0] - a[..., 1] * b[..., 1]
        return torch.stack([real, a[..., 0] * b[..., 1] + a[..., 1] * b[..., 0]], -1)
    if name in ("mul", "div", "add", "sub") and (name in ("mul", "div") or all(pairs)):
        result: Tensor = op.target(*tensors)
        return result
    if name in ("clone", "contiguous", "to", "_to_copy", "alias"):
        return tensors[0]
    raise Refused(op, f"computes {name} of complex numbers: write it with real ones")

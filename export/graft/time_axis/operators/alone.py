"""Runs an unsupported operator by itself: do later positions affect earlier ones, or earlier ones later ones?"""

from __future__ import annotations

import torch
from torch import Tensor

from ...probe.causes import Kind
from ..program.program import Op, Size, Tables, map_args
from .base import Refused, Unknown


def alone(refused: Refused, tables: Tables) -> Refused:
    """Finds the kind of an unknown refusal by running the operator on random operands, if it accepts them."""
    op = refused.op
    if refused.cause.kind != Kind.UNKNOWN:
        return refused
    ahead, back = _changed(op, tables, -1), _changed(op, tables, 0)
    name = op.name.strip("_")
    if ahead is not None and bool(ahead[:-1].any()):
        return Refused(op, f"computes {name} over all positions, including later ones", Kind.LOOK_AHEAD)
    if back is not None and bool(back[1:].any()):
        what = f"computes {name} over earlier positions" if isinstance(refused, Unknown) else refused.cause.what
        return Refused(op, what, Kind.RECURRENCE)
    return refused


def _changed(op: Op, tables: Tables, place: int) -> Tensor | None:
    """(T,) which positions of the result change with the operands at position `place`; None if unknown."""
    generator = torch.Generator().manual_seed(0)
    results = []
    drawn: dict[Op, Tensor] = {}
    for change in (False, True):

        def operand(source: Op, change: bool = change) -> Tensor:
            if not source.depends:
                found: Tensor = tables(source)
                return found
            if source not in drawn:
                drawn[source] = torch.randn([s.at(tables.length) for s in source.shape], generator=generator)
            tensor = drawn[source].clone()
            for axis, size in enumerate(source.shape):
                if change and size == Size(1, 0):
                    tensor.select(axis, place).add_(1)
            return tensor.to(source.dtype)

        try:
            args, kwargs = map_args((op.args, op.kwargs), operand, lambda size: size.at(tables.length))
            with torch.no_grad():
                result = op.target(*args, **kwargs)
        except Exception:  # it does not accept the random operands
            return None
        results.append(result[0] if isinstance(result, list | tuple) else result)
    shape = op.shapes[0]
    axes = [i for i, size in enumerate(shape or ()) if size == Size(1, 0)]
    if len(axes) != 1:
        return None
    by_row = (~torch.isclose(*results)).movedim(axes[0], 0)
    return by_row.reshape(len(by_row), -1).any(1)

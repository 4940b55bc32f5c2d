"""Finds rotary positions by their effect: a rotation of queries and keys by angles that depend on the position.

RoFormer, https://arxiv.org/abs/2104.09864. The operators between a projection and q kᵀ run on known inputs. If they
rotate pairs of channels (neighbours, or from the two halves of a head), the result shows cos and sin of every position,
and GroupQueryAttention can do the rotation instead. The author may write it with complex numbers or without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..interpret import Attention, Interpreter, Weight
from ..operators.base import Refused
from ..program.program import Op, Program, Tables
from ..values import NEW, Lengths, Value, laid

_FURTHEST = 60  # most operators before the product
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Rotation:
    """Queries and keys before the rotation, and cos and sin (context, D / 2) of every position."""

    query: Op
    key: Op
    cos: Tensor
    sin: Tensor
    interleaved: bool  # pairs of neighbouring channels instead of channels of the two halves


def find_rotation(
    program: Program,
    attention: Attention,
    known: dict[Op, Value],
    weight: Weight,
    context_length: int,
    *,
    swapped: bool,
) -> Rotation | None:
    """The rotation of both operands of an attention's product by the same angles, or None."""
    if len(attention.products) != 1 or len([i for i in attention.layouts[0].heads if _long(attention, i)]) > 1:
        return None  # several head axes may have another order in the product
    product = attention.products[0]
    operands = product.args[1] if product.name == "einsum" else product.args[:2]
    if swapped:
        operands = operands[::-1]
    if len(operands) != 2 or not all(isinstance(op, Op) and op.depends for op in operands):
        return None
    tables = Tables(context_length)
    found = [_turned(program, op, known, weight, tables) for op in operands]
    query, key = found
    if query is None or key is None or query.interleaved != key.interleaved:
        return None
    if not torch.allclose(query.cos, key.cos, atol=1e-7) or not torch.allclose(query.sin, key.sin, atol=1e-7):
        return None
    return Rotation(query.source, key.source, query.cos, query.sin, query.interleaved)


def _long(attention: Attention, axis: int) -> bool:
    return attention.layouts[0].axes[axis].size > 1


@dataclass(frozen=True)
class _Turned:
    source: Op
    cos: Tensor
    sin: Tensor
    interleaved: bool


def _turned(program: Program, operand: Op, known: dict[Op, Value], weight: Weight, tables: Tables) -> _Turned | None:
    """The operand as the rotation of an earlier value by its positions; of several such values, the furthest."""
    best = None
    for source, between in _dominators(operand, known):
        if not any(i.timed and not i.depends for op in between for i in op.inputs):
            continue
        found = _as_rotation(program, source, between, operand, known, weight, tables)
        best = found or best
        if found is None and best is not None:
            break
    return best


def _dominators(operand: Op, known: dict[Op, Value]) -> list[tuple[Op, list[Op]]]:
    """The values that alone determine the operand, the nearest first, each with the operators in between."""
    found: list[tuple[Op, list[Op]]] = []
    between: list[Op] = []
    waiting = {operand}
    while waiting and len(between) < _FURTHEST:
        if len(waiting) == 1:
            (only,) = waiting
            if only is not operand and isinstance(known.get(only), Value):
                found.append((only, between[::-1]))
            if only.name in ("linear", "embedding", "layer_norm", "rms_norm") or only.target == "ids":
                break
        last = max(waiting, key=lambda op: op.number)
        waiting.remove(last)
        between.append(last)
        waiting |= {i for i in last.inputs if i.depends}
    return found


def _as_rotation(
    program: Program,
    source: Op,
    between: Sequence[Op],
    operand: Op,
    known: dict[Op, Value],
    weight: Weight,
    tables: Tables,
) -> _Turned | None:
    start, end = known[source], known[operand]
    if start.axes[-1].time or end.batched is False or start.lifted or start.complex:
        return None
    size = start.axes[-1].size
    if size % 2 or len(start.time_axes(NEW)) != 1 or len(end.time_axes(NEW)) != 1:
        return None
    length = tables.length

    def run(x: Tensor) -> Tensor | None:
        """(K, T, D) before -> (K, T, D) after."""
        segment = _Segment(program, Lengths(length, length), weight, tables)
        try:
            segment.known[source] = unheaded(x[None], start)
            with torch.no_grad():
                for op in between:
                    segment.known[op] = segment.apply(op, segment.value_of)
        except (Refused, RuntimeError):
            return None
        turned = headed(segment.known[operand])
        return turned[0] if turned is not None and turned.shape[1:] == x[None].shape[1:] else None

    heads = _head_count(start)
    halves = torch.zeros(size)
    halves[: size // 2] = 1
    pairs = torch.zeros(size)
    pairs[0::2] = 1
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(heads, length, size, generator=generator)
    expected = run(x)
    if expected is None:
        return None
    for interleaved, basis in ((False, halves), (True, pairs)):
        made = run(basis.expand(heads, length, size))
        if made is None:
            return None
        first, second = (made[0, :, 0::2], made[0, :, 1::2]) if interleaved else made[0].chunk(2, -1)
        turned = rotate(x, first, second, interleaved=interleaved)
        if float((turned - expected).abs().max()) <= _TOLERANCE * float(expected.abs().max()):
            if float(second.abs().max()) < _TOLERANCE:  # no rotation
                return None
            return _Turned(source, first.clone(), second.clone(), interleaved)
    return None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotates (..., T, D) by cos and sin (T, D / 2)."""
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class _Segment(Interpreter):
    """Runs some operators on a whole sequence."""

    def __init__(self, program: Program, lengths: Lengths, weight: Weight, tables: Tables) -> None:
        super().__init__(program, lengths, weight)
        self._tables = tables

    def table(self, op: Op, times: Sequence[str | None]) -> Value:
        return laid(self._tables(op), op.shape, times)

    def fixed(self, op: Op) -> Tensor:
        found: Tensor = self._tables(op)
        return found


def _places(value: Value) -> list[int]:
    """The author's axes in the order heads, tokens, channels of a head."""
    last = len(value.axes) - 1
    time = value.time_axes(NEW)[0]
    return [*(i for i in range(last) if i not in (time, value.batch_axis)), time, last]


def _head_count(value: Value) -> int:
    count = 1
    for i in _places(value)[:-2]:
        count *= value.axes[i].size // value.axes[i].repeat
    return count


def headed(value: Value) -> Tensor | None:
    """The value as (B, K, T, D), with each expanded head once; None if the batch axis is in the way."""
    last = len(value.axes) - 1
    if value.time_axes(NEW) == [last]:  # keys that are already transposed
        order = list(range(last + 1))
        order[last], order[last - 1] = last - 1, last
        if last - 1 == value.batch_axis:
            return None
        tensor = value.tensor.transpose(value.dim(last), value.dim(last - 1))
        axes = tuple(value.axes[i] for i in order)
        value = value.with_(tensor=tensor, axes=axes)
    places = [value.dim(i) for i in _places(value)]
    tensor = value.tensor
    if places != sorted(places):
        tensor = tensor.permute([0, *places])
    return tensor if len(places) == 3 else tensor.reshape(tensor.shape[0], _head_count(value), *tensor.shape[-2:])


def unheaded(x: Tensor, like: Value) -> Value:
    """(B, K, T, D) as a value with the axes of `like`."""
    places = _places(like)
    sizes = [like.axes[i].size // like.axes[i].repeat for i in places[:-2]]
    tensor = x.reshape(x.shape[0], *sizes, *x.shape[2:])
    order = sorted(range(len(places)), key=lambda k: places[k])
    return like.with_(tensor=tensor.permute([0, *(1 + k for k in order)]))

"""Finds a smaller row that keys and values are linear functions of, such as the latent of MLA, to cache it instead.

DeepSeek-V2, https://arxiv.org/abs/2405.04434. Keys and values are made by operators whose results nothing else reads.
Each cut through these operators is a set of values that determines keys and values. `find_latent` chooses the smallest
one, in numbers per token, and runs the operators behind it on known rows. If they are linear, and the same at every
position, the results show their matrices.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from ....compare import NUMBERS, relative_difference
from ..interpret import FollowedAttention
from ..operators.base import Refused
from ..program.program import Op
from ..values import NEW, Value
from .row import Latent
from .step import Planned, Step

_MOST_WORK = 6  # numbers of a row that a query meets, per number of its own key and value: slower above, as measured
_TRIED = 8  # random rows

# A step of the program in which only this attention is planned, at positions (1, T).
StepOn = Callable[[type[Step], Planned, Tensor], Step]


def find_latent(
    planned: Planned,
    known: Mapping[Op, Any],
    swapped: set[Op],
    step_on: StepOn,
    context_length: int,
    constants: dict[str, Tensor],
) -> Latent | None:
    """The row of an attention if it is smaller than keys and values; adds its matrices to `constants`."""
    operands = _operands(planned.attention, known, swapped)
    if not planned.known or operands is None:
        return None
    queries, ends = operands
    cone = _cone(planned.attention, queries, ends)
    if not cone.issuperset(ends):
        return None
    sources, between = _smallest_cut(ends, cone, known)
    channels = sum(_size(op, known) for op in sources)
    if not channels < sum(_size(op, known) for op in ends):
        return None

    def keys_and_values(rows: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Rows (T, channels) -> keys (K, T, D) and values (K, T, Dv) at a position."""
        step = step_on(_Operands, planned, torch.full((1, len(rows)), position))
        assert isinstance(step, _Operands)
        parts = rows[None].split([int(_size(op, known)) for op in sources], 2)
        step.known |= known
        step.known |= {op: _laid(part, known[op]) for op, part in zip(sources, parts, strict=True)}
        for op in (*between, *planned.attention.products, planned.attention.op):
            step.known[op] = step.apply(op, step.value_of)
        return step.key[0], step.value[0]

    basis = torch.cat([torch.zeros(1, int(channels)), torch.eye(int(channels))])
    tried = torch.randn(_TRIED, int(channels), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            measured, checked = keys_and_values(basis, 0), keys_and_values(tried, context_length - 1)
    except (Refused, RuntimeError):
        return None
    matrices = [made[:, 1:] - made[:, :1] for made in measured]  # (K, channels, D)
    biases = [made[:, :1] for made in measured]  # (K, 1, D)
    for made, matrix, bias in zip(checked, matrices, biases, strict=True):
        if not relative_difference(made, tried @ matrix + bias) <= NUMBERS:
            return None
    if biases[0].any() and (planned.softcap is not None or planned.sinks):
        return None  # otherwise a number added to all scores of a query changes no weight
    if biases[1].any() and planned.sinks:
        return None  # otherwise weights sum to 1
    # Sources that only keys read come first, so that the row needs no other order.
    parts = torch.arange(int(channels)).split([int(_size(op, known)) for op in sources])
    ordered = sorted(range(len(parts)), key=lambda i: bool(matrices[1][:, parts[i]].any()))
    sources, places = tuple(sources[i] for i in ordered), torch.cat([parts[i] for i in ordered])
    keys, values = (matrix[:, places] for matrix in matrices)
    return _latent(planned.number, sources, between, keys, values, biases[1], constants)


def _latent(
    number: int,
    sources: tuple[Op, ...],
    between: tuple[Op, ...],
    keys: Tensor,  # (K, channels, D)
    values: Tensor,  # (K, channels, Dv)
    bias: Tensor,  # (K, 1, Dv) of the values
    constants: dict[str, Tensor],
) -> Latent | None:
    summed = values.ne(0).any(2).any(0)  # (channels,) those that values read
    met = keys.ne(0).any(2).any(0)
    order = torch.argsort(summed.int(), stable=True)
    channels, key_size = len(order), int((~summed).sum())
    shared: Literal["none", "value", "row"] = "value" if bool((met & summed).any()) else "none"
    if key_size in (0, channels):  # one of the two would be empty
        shared, key_size = "row", channels // 2
    parts = {"none": [key_size], "value": [key_size, channels - key_size], "row": [channels]}[shared]
    result = channels if shared == "row" else channels - key_size
    if not key_size or sum(parts) + result > _MOST_WORK * (keys.shape[2] + values.shape[2]):
        return None
    keys, values = keys[:, order], values[:, order[channels - result :]]
    queries = []
    for kind, part in zip(("key", "value"), keys[:, : sum(parts)].split(parts, 1), strict=False):
        used = part.ne(0).any(1).any(0).nonzero()
        first, last = int(used.min()), int(used.max()) + 1
        part = part[..., first:last]
        queries.append((first, last, not _is_identity(part)))
        if not _is_identity(part):
            constants[f"{kind}_{number}"] = part.transpose(1, 2)[:, None].contiguous()
    if not _is_identity(values):
        constants[f"output_{number}"] = values[:, None].contiguous()
    if bias.any():
        constants[f"output_bias_{number}"] = bias[:, None].contiguous()
    return Latent(
        sources,
        between,
        order=None if bool((order == torch.arange(channels)).all()) else tuple(order.tolist()),
        key_size=key_size,
        shared=shared,
        queries=tuple(queries),
        output=not _is_identity(values),
        bias=bool(bias.any()),
    )


def _is_identity(matrix: Tensor) -> bool:
    return matrix.shape[1] == matrix.shape[2] and bool((matrix == torch.eye(matrix.shape[1])).all())


class _Operands(Step):
    """Keeps the keys and values of one attention."""

    key: Tensor  # (B, K, T, D)
    value: Tensor  # (B, K, T, Dv)

    def _attend(self, op: Op, planned: Planned, queries: list[Tensor], keys: list[Tensor], value: Tensor) -> Tensor:
        self.key, self.value = torch.cat(keys, -1), value
        return value.new_zeros(len(value), queries[0].shape[1], *value.shape[2:])


def _laid(rows: Tensor, like: Value) -> Value:
    """Rows (B, T, channels) as a value with the axes of `like`."""
    time = like.time_axes(NEW)[0]
    sizes = [a.size // a.repeat for i, a in enumerate(like.axes) if i not in (time, like.batch_axis)]
    return like.with_(tensor=rows.reshape(*rows.shape[:2], *sizes).movedim(1, like.dim(time)))


# --- the smallest cut ---------------------------------------------------------------------------------------------
def _operands(
    attention: FollowedAttention, known: Mapping[Op, Any], swapped: set[Op]
) -> tuple[list[Op], list[Op]] | None:
    """The queries, and the keys and values; None if these are no rows of the tokens."""
    queries, ends = [], []
    for op in (*attention.products, attention.op):
        pair = list(op.args[1] if op.name == "einsum" else op.args[:2])
        if op is attention.op:
            ends += [operand for operand in pair if operand is not attention.weights]
        else:
            queries.append(pair[op in swapped])
            ends.append(pair[op not in swapped])
    if len(ends) != len(attention.products) + 1 or not queries or not all(_size(op, known) < math.inf for op in ends):
        return None
    return queries, ends


def _size(op: Op, known: Mapping[Op, Any]) -> float:
    """Numbers per token; infinite if it cannot be cached as rows of the tokens."""
    value = known.get(op)
    if not isinstance(value, Value) or not value.batched or value.lifted or value.complex or value.products:
        return math.inf
    times = [axis for axis in value.axes if axis.time is not None]
    if len(times) != 1 or not times[0].plain_time or not value.tensor.is_floating_point():
        return math.inf
    return math.prod(axis.size // axis.repeat for axis in value.axes if axis.time is None)


def _cone(attention: FollowedAttention, queries: Sequence[Op], ends: Sequence[Op]) -> set[Op]:
    """The operators whose results only the keys and values of this attention need."""
    cone: set[Op] = set()
    readers = {*attention.products, attention.op}
    waiting = set(ends) - {*queries, attention.weights}
    while waiting:
        op = max(waiting, key=lambda op: op.number)
        waiting.remove(op)
        if op.depends and all(user in cone or user in readers for user in op.users):
            cone.add(op)
            waiting |= {i for i in op.inputs if i.depends} - {*queries, attention.weights}
    return cone


def _smallest_cut(ends: Sequence[Op], cone: set[Op], known: Mapping[Op, Any]) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """The fewest numbers per token that determine `ends`, as close to them as possible, and the operators behind.

    By the largest flow from the ends to where the cone begins (Edmonds and Karp). An operator is an edge of its size.
    """
    start, stop = (None, 0), (None, 1)
    room: dict[Any, dict[Any, float]] = defaultdict(lambda: defaultdict(float))
    for op in cone:
        room[op, 0][op, 1] = _size(op, known)
        for source in op.inputs:
            if source.depends:
                room[op, 1][(source, 0) if source in cone else stop] = math.inf
    for op in ends:
        room[start][op, 0] = math.inf
    while True:
        reached: dict[Any, Any] = {start: None}
        for place in (queue := [start]):
            for other, free in room[place].items():
                if free > 0 and other not in reached:
                    reached[other] = place
                    queue.append(other)
        if stop not in reached:
            break
        path = [stop]
        while path[-1] != start:
            path.append(reached[path[-1]])
        steps = [(before, after) for after, before in pairwise(path)]
        width = min(room[before][after] for before, after in steps)
        for before, after in steps:
            room[before][after] -= width
            room[after][before] += width
    in_order = sorted(cone, key=lambda op: op.number)
    cut = tuple(op for op in in_order if (op, 0) in reached and (op, 1) not in reached)
    return cut, tuple(op for op in in_order if (op, 1) in reached)

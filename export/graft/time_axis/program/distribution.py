"""Distributes loops over tokens: only a value that depends on itself through the token before is a recurrence.

The operators of a rolled-up loop and their values form a graph, with an edge from each value to the `token_before`
that reads it. Its cycles (strongly connected components) are the recurrences. Everything else is computed for all
tokens at once: for example, the projections of a cell's inputs and of its outputs. Layers inside a loop over
tokens come apart into one recurrence for each layer.

Allen and Kennedy, Automatic translation of Fortran programs to vector form, 1987.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...probe.causes import Cause, Kind, ObstacleError
from .op import Op, map_args

_MATRICES = {"linear", "matmul", "bmm", "mm", "mv", "einsum", "addmm", "outer"}


@dataclass(frozen=True, eq=False, repr=False)
class Recurrence:
    """The target of an operator that runs a body for each token. Its argument is the list of the body's inputs."""

    states: tuple[tuple[Op, Op], ...]  # token_before, and the value that it reads of the token before
    body: tuple[Op, ...]  # in order
    outputs: tuple[Op, ...]
    __name__: ClassVar[str] = "recurrence"


def distributed(logits: Op, ids: Op) -> list[Op]:
    """The operators that the logits need, in order, with each recurrence as one operator."""
    order = _merged(_sorted(logits))
    place = {op: i for i, op in enumerate(order)}
    group: dict[Op, set[Op]] = {}
    for found in _cycles(order):
        group |= dict.fromkeys(found, found)
    _add_readouts(order, group)
    bodies = [sorted(found, key=place.__getitem__) for found in {id(found): found for found in group.values()}.values()]
    replaced: dict[Op, Op] = {}  # values of recurrences that are read elsewhere
    runs = [_recurrence(body, order, group, replaced) for body in bodies]
    for op in order:
        within = group.get(op, set())

        def read(source: Op, within: set[Op] = within) -> Op:
            return source if source in within else replaced.get(source, source)

        op.args, op.kwargs = map_args((op.args, op.kwargs), read)
        if op.back is not None and not within:
            op.args, op.back = (replaced.get(op.back, op.back),), None
    for run, body in zip(runs, bodies, strict=True):
        within = group[body[0]]
        run.args = ([ids, *dict.fromkeys(i for op in body for i in op.inputs if i not in within)],)
    return _sorted(replaced.get(logits, logits))


def _sorted(logits: Op) -> list[Op]:
    """The operators that the logits need, each behind its inputs; values of a token before are not followed."""
    done: dict[Op, None] = {}
    ends = [logits]
    while ends:
        stack = [(ends.pop(), False)]
        while stack:
            op, ready = stack.pop()
            if ready:
                done[op] = None
            elif op not in done:
                stack.append((op, True))
                stack.extend((i, False) for i in op.inputs if i not in done)
                if op.back is not None and op.back not in done:
                    ends.append(op.back)
    return [*done]


def _merged(order: Sequence[Op]) -> list[Op]:
    """The operators without those that compute the same as another one, such as a second x[:, t]."""
    known: dict[str, Op] = {}
    instead: dict[Op, Op] = {}
    for op in order:
        op.args, op.kwargs = map_args((op.args, op.kwargs), lambda i: instead.get(i, i))
        told = repr((op.target, map_args((op.args, op.kwargs), id)))
        instead[op] = op if isinstance(op.target, str) or op.back is not None else known.setdefault(told, op)
    for op in order:
        op.back = None if op.back is None else instead[op.back]
    return [op for op in order if instead[op] is op]


def _cycles(order: Sequence[Op]) -> Iterable[set[Op]]:
    """The strongly connected components of more than one operator (Tarjan), without recursion."""
    number: dict[Op, int] = {}
    low: dict[Op, int] = {}
    path: list[Op] = []
    on_path: set[Op] = set()
    for start in order:
        work = [(start, iter(_reads(start)))] if start not in number else []
        while work:
            op, rest = work[-1]
            if op not in number:
                number[op] = low[op] = len(number)
                path.append(op)
                on_path.add(op)
            for source in rest:
                if source not in number:
                    work.append((source, iter(_reads(source))))
                    break
                if source in on_path:
                    low[op] = min(low[op], number[source])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[op])
                if low[op] == number[op]:
                    found = {path.pop()}
                    while op not in found:
                        found.add(path.pop())
                    on_path -= found
                    if len(found) > 1:
                        yield found


def _reads(op: Op) -> list[Op]:
    return op.inputs if op.back is None else [op.back]


def numbers_of(op: Op) -> int:
    """How many numbers its largest value has, of one token."""
    sizes: list[int] = [math.prod(size.at(0) for size in shape) for shape in op.shapes if shape is not None]
    return max(sizes)


def _add_readouts(order: Sequence[Op], group: dict[Op, set[Op]]) -> None:
    """Adds to each recurrence the operators that make fewer numbers of its values, such as a query times a matrix.

    Otherwise the matrices of all tokens would be in memory at once. A product with weights is no readout: behind the
    recurrence it is one product for all tokens.
    """
    users: dict[Op, list[Op]] = {}
    for op in order:
        for source in op.inputs:
            users.setdefault(source, []).append(op)
    for op in [op for op in order if op in group]:
        reached: list[Op] = []
        for user in users.get(op, ()):
            path = [user]
            if user in group:
                continue
            while _is_local(path[-1], {*group[op], *path}):
                if numbers_of(path[-1]) < numbers_of(op):
                    reached += path
                    break
                following = users.get(path[-1], [])
                if len(following) != 1 or following[0] in group:
                    break
                path.append(following[0])
        for found in dict.fromkeys(reached):
            group[op].add(found)
            group[found] = group[op]


def _is_local(op: Op, within: set[Op]) -> bool:
    """Whether it computes with values of the recurrence and values of a token that are known before, no weights."""
    others = [_needed(i) for i in op.inputs if i not in within]
    if op.back is not None or op.timed or op.name == "text_rows" or any(within & needed for needed in others):
        return False
    return op.name not in _MATRICES or all(any(i.name == "token_row" for i in needed) for needed in others)


def _needed(op: Op) -> set[Op]:
    """The values that an operator needs, those of tokens before included."""
    found, stack = {op}, [op]
    while stack:
        new = {i for i in _reads(stack.pop()) if i not in found}
        found |= new
        stack.extend(new)
    return found


def _recurrence(body: Sequence[Op], order: Sequence[Op], group: Mapping[Op, set[Op]], replaced: dict[Op, Op]) -> Op:
    """The operator that runs a body; adds to `replaced` those that give its values to others."""
    for op in body:
        if op.timed:
            what = "carries rows of the whole text from token to token, and reads them: carry those that it reads"
            raise ObstacleError(Cause(Kind.RECURRENCE, f"is a loop over tokens that {what}", op.where, op.owner))
    states = tuple((op, op.back) for op in body if op.back is not None)
    within = group[body[0]]
    read = {i for op in order if op not in within for i in _reads(op)}
    outputs = tuple(op for op in body if op in read)
    target = Recurrence(states, tuple(op for op in body if op.back is None), outputs)
    last = states[0][1]
    run = Op(target, (), {}, tuple(op.shapes[0] for op in outputs), last.dtype, last.where, owner=last.owner)
    for i, op in enumerate(outputs):
        replaced[op] = Op(operator.getitem, (run, i), {}, op.shapes, op.dtype, op.where, owner=op.owner)
    return run

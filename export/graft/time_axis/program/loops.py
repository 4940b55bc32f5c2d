"""Rolls up the loops over tokens that a trace has unrolled.

A trace of a loop is periodic, and a longer text adds whole periods. So the first operator that differs between two
traces ends a loop. Its bodies are compared operator by operator. Then one body replaces all:

    token_row(x, dim)      instead of x[:, t]: the row of each token
    token_before()         instead of the value from the body of the token before, `Op.back`: a value that crosses
    text_rows(y, dim)      instead of a stack of the values of all bodies

The position chooses the beginning of a loop: where(position == 0, beginning, value that crosses).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .nodes import Traced
from .op import Op

aten = torch.ops.aten

_FEWEST = 3  # bodies that determine a loop


def token_row(x: Tensor, dim: int, kept: bool) -> Tensor:
    """The row of each token along an axis of the text; `kept`: with that axis, of size 1."""
    raise NotImplementedError


def token_before() -> Tensor:
    """The value of the token before: zeros for the first."""
    raise NotImplementedError


def text_rows(y: Tensor, dim: int, kept: bool) -> Tensor:
    """The rows of all tokens along a new axis; `kept`: along one of size 1."""
    raise NotImplementedError


@dataclass(frozen=True)
class Loop:
    """A loop in one trace."""

    start: int  # the first call of the first body
    period: int  # calls of one body
    count: int  # whole bodies
    part: tuple[int, ...]  # the calls of one more body, the last: the others would be read only by later tokens
    skipped: int  # tokens before the first body: 0 or 1

    @property
    def end(self) -> int:
        return self.start + self.count * self.period + len(self.part)

    def bodies(self, calls: Sequence[Traced]) -> list[list[Traced | None]]:
        """The calls of each body, None for those that the last one lacks."""
        size, behind = self.period, self.start + self.count * self.period
        bodies: list[list[Traced | None]] = [[*calls[at : at + size]] for at in range(self.start, behind, size)]
        if self.part:
            last = dict(zip(self.part, calls[behind : self.end], strict=True))
            bodies.append([last.get(call) for call in range(size)])
        return bodies


def find_loops(
    first: Sequence[Traced], second: Sequence[Traced], lengths: tuple[int, int]
) -> tuple[list[Loop], list[Loop]] | None:
    """The loops over tokens in the calls of both traces; None if something else differs between them."""
    one, other = ([(traced.target, traced.where) for traced in nodes] for nodes in (first, second))
    more = lengths[0] - lengths[1]
    found: tuple[list[Loop], list[Loop]] = [], []
    tokens: dict[fx.Node, int] = {}
    at = shift = place = 0  # behind the last loop in the first trace; that trace's further nodes; in the second trace
    while place < len(other) or place + shift < len(one):
        if place < len(other) and place + shift < len(one) and other[place] == one[place + shift]:
            place += 1
            continue
        end, after = place + shift, other[place:]
        period = next((p for p in range(1, (len(one) - end) // more + 1) if _ends(one, end, p, more, after)), 0)
        if not period:
            return None
        start = end
        while start > at and one[start - 1] == one[start - 1 + period]:
            start -= 1
        starts = range(start, start + period)
        turned = (_turned(first, one, begin, end, period, lengths[1], tokens, after) for begin in starts)
        fitting = [loop for loop in turned if loop is not None]
        loop = max(fitting, key=lambda loop: (loop.end, -loop.start), default=None)  # the most of the last body
        if loop is None:
            return None
        found[1].append(dataclasses.replace(loop, start=loop.start - shift))
        found[0].append(dataclasses.replace(loop, count=loop.count + more))
        for token, body in enumerate(found[0][-1].bodies(first)):
            tokens |= {traced.node: token + loop.skipped for traced in body if traced is not None}
        shift += period * more
        place = found[1][-1].end
        at = place + shift
    return found


def _ends(keys: Sequence[Any], end: int, period: int, more: int, after: Sequence[Any]) -> bool:
    """Whether `more` bodies of this period follow, and then the rest of the shorter trace."""
    behind = end + more * period
    if period > end or keys[end - period] != keys[end] or keys[behind : behind + 1] != [*after[:1]]:
        return False
    body = keys[end : end + period]
    bodies = [keys[end + i * period : end + (i + 1) * period] for i in range(-1, more)]
    return all(other == body for other in bodies)


def _turned(
    calls: Sequence[Traced],
    keys: Sequence[Any],
    start: int,
    end: int,
    period: int,
    length: int,
    tokens: Mapping[fx.Node, int],
    after: Sequence[Any],
) -> Loop | None:
    """The loop whose bodies begin at `start`; None if that makes a body of parts of two."""
    count, rest = divmod(end - start, period)
    part, place = [*range(rest)], 0
    for call in range(rest, period):
        if place < len(after) and after[place] == keys[start + call]:
            part.append(call)
            place += 1
    read: set[int] = set()
    for traced, later in zip(calls[start + period : start + 2 * period], calls[start + 2 * period :], strict=False):
        row, other = row_of(traced), row_of(later)
        read |= {row[2]} if row is not None and other is not None and row[2] != other[2] else set()
        read |= {tokens[node] for node in nodes_in(traced.args) if node in tokens}
    bodies = count + bool(part)
    skipped = min(read) - 1 if read else length - bodies
    fits = bodies + skipped == length or (bodies == count == length - 1 and skipped == 0)
    if not fits or skipped not in (0, 1) or count < _FEWEST or len(read) > 1:
        return None
    return Loop(start, period, count, tuple(part), skipped)


def row_of(traced: Traced) -> tuple[fx.Node, int, int, bool, bool] | None:
    """(source, dim, index, whether the axis is kept, whether it is written) of an operator on one row of an axis."""
    args = traced.args
    if traced.target is aten.select.int:
        dim = _axis(args[0], args[1])
        return args[0], dim, args[2] % args[0].meta["val"].shape[dim], False, False
    if traced.target is aten.slice.Tensor and len(args) == 4 and args[3] == (args[2] or 0) + 1:
        return args[0], _axis(args[0], args[1]), args[2] or 0, True, False
    if traced.target is aten.select_scatter.default:
        return args[0], _axis(args[0], args[2]), args[3], False, True
    if traced.target is aten.slice_scatter.default and len(args) == 5 and args[4] == (args[3] or 0) + 1:
        return args[0], _axis(args[0], args[2]), args[3] or 0, True, True
    if traced.target is operator.getitem and args[0].target in (aten.unbind.int, aten.split.Tensor):
        source, *settings = args[0].args
        if args[0].target is aten.unbind.int or settings[0] == 1:
            dim = settings[-1] if len(settings) == 1 + (args[0].target is aten.split.Tensor) else 0
            return source, _axis(source, dim), args[1], args[0].target is aten.split.Tensor, False
    return None


def _axis(source: fx.Node, dim: int) -> int:
    return int(dim % source.meta["val"].dim())


def is_zero(made: fx.Node | Op) -> bool:
    """Whether an operator makes zeros, as far as its name says."""
    name = str(made.target).removeprefix("aten.").partition(".")[0]
    if name in _VIEWS:
        return is_zero(made.args[0])  # type: ignore[arg-type]
    return name in ("zeros", "new_zeros", "zeros_like") or (name == "full" and bool(made.args[1] == 0))


def nodes_in(args: Any) -> list[fx.Node]:
    """The nodes among the arguments of a node."""
    return [a for a in tree_leaves(args) if isinstance(a, fx.Node)]


_VIEWS = ("view", "reshape", "expand", "select", "slice", "squeeze", "unsqueeze", "clone", "repeat", "_to_copy", "to")

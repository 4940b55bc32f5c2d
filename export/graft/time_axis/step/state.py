"""Caches the last few rows for operators that shift rows: a mix with the previous token, a short causal convolution.

Operators that shift, pad, join or convolve rows form a group, until the rows are back at their tokens' positions.
`find_state` runs the group on random numbers: a row may change at most `keep` later rows, and no earlier row. A later
token then needs only the last `keep` rows of the inputs; the group runs on these and the new rows as a whole sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....compare import UNCHANGED
from ...probe.causes import Kind
from ..interpret import Interpreter, Weight
from ..operators.base import Refused
from ..program.program import Op, Program
from ..values import LOCAL, NEW, Lengths, Value

MOST_ROWS = 16  # most rows that a state keeps
_LENGTH = 40  # tokens of the sequence on which a state is tried


@dataclass(frozen=True)
class State:
    """Operators that shift rows, and how many of the last rows they need of each input."""

    op: Op  # the last operator
    between: tuple[Op, ...]  # in order, the last one included
    inputs: tuple[Op, ...]
    keep: int


class Shifted(Interpreter):
    """Runs the operators of a state on rows as if they were a whole sequence."""

    def __init__(self, program: Program, length: Any, weight: Weight) -> None:
        super().__init__(program, Lengths(length, length), weight)
        self.shifts = True

    def run(self, between: Sequence[Op], op: Op, inputs: Mapping[Op, Value]) -> Value:
        """The rows of the last operator."""
        self.known |= inputs
        for part in between:
            self.known[part] = self.apply(part, self.value_of)
        found: Value = self.known[op]
        return found.with_(products=found.products - {LOCAL})

    def table(self, op: Op, times: Sequence[str | None]) -> Value:
        del times
        raise Refused(op, "shifts rows by a table of positions", Kind.RECURRENCE)

    def fixed(self, op: Op) -> Any:
        raise Refused(op, "shifts rows by a number made from the length", Kind.LENGTH)


def find_state(program: Program, op: Op, known: Mapping[Op, Any], local: set[Op], weight: Weight) -> State:
    """The state that computes the rows of `op`. Raises Refused if its last few input rows do not suffice."""
    between, inputs, stack = {op}, set(), [op]
    while stack:
        for source in stack.pop().inputs:
            if not source.depends or source in between or source in inputs:
                continue
            if source in local:
                between.add(source)
                stack.append(source)
            else:
                inputs.add(source)
    ordered = tuple(sorted(between, key=lambda part: part.number))
    first = tuple(sorted(inputs, key=lambda part: part.number))
    return State(op, ordered, first, _kept(program, op, ordered, first, known, weight))


def _kept(
    program: Program, op: Op, between: Sequence[Op], inputs: Sequence[Op], known: Mapping[Op, Any], weight: Weight
) -> int:
    generator = torch.Generator().manual_seed(0)

    def rows(count: int, length: int) -> dict[Op, Value]:
        made = {}
        for source in inputs:
            value = known[source]
            if len(value.time_axes(NEW)) != 1 or value.scores or value.lifted:
                raise Refused(op, "shifts a value that has no row of the tokens", Kind.RECURRENCE)
            sizes = [
                length if a.time else a.size // a.repeat for i, a in enumerate(value.axes) if i != value.batch_axis
            ]
            numbers = torch.randn([1, *sizes], generator=generator).to(value.tensor.dtype)
            made[source] = value.with_(tensor=numbers.repeat(count, *[1] * len(sizes)))
        return made

    def run(given: Mapping[Op, Value], length: int) -> Tensor:
        with torch.no_grad():
            found = Shifted(program, length, weight).run(between, op, given)
        return found.tensor.movedim(found.dim(found.time_axes(NEW)[0]), 1)[..., None].flatten(2)

    given = rows(_LENGTH + 1, _LENGTH)
    for value in given.values():  # sequence i differs in row i; the last sequence is unchanged
        at = value.dim(value.time_axes(NEW)[0])
        tensor = value.tensor.movedim(at, 1)
        for i in range(_LENGTH):
            tensor[i, i] += 1
    made = run(given, _LENGTH)
    differences = (made[:-1] - made[-1:]).abs().amax(-1)
    changed = differences > UNCHANGED * made.abs().max()  # [row that was changed, row that changes]
    distance = torch.arange(_LENGTH)[None, :] - torch.arange(_LENGTH)[:, None]
    if bool((changed & (distance < 0)).any()):
        raise Refused(op, "moves rows of later tokens to earlier ones", Kind.LOOK_AHEAD)
    keep = int(torch.where(changed, distance, 0).max())
    if keep > MOST_ROWS:
        raise Refused(op, f"mixes a token with the {keep} tokens before it or more", Kind.RECURRENCE)
    part = {}
    for source, value in given.items():
        at = value.dim(value.time_axes(NEW)[0])
        part[source] = value.with_(tensor=value.tensor[-1:].narrow(at, 7, _LENGTH - 7))
    later = run(part, _LENGTH - 7)
    if not torch.allclose(later[0, keep:], made[-1, 7 + keep :], rtol=1e-4, atol=1e-5):
        raise Refused(op, "shifts rows by their place in the text", Kind.RECURRENCE)
    return keep

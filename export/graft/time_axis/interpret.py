"""Runs a program in three ways: a whole sequence to find attention, one step, the weights of one attention.

All three apply the same rules, but on other forms of a table (all of it, the rows at given positions, the last rows
and all columns) and of a product of queries and keys (numbers, stored operands, given scores).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pastkey.errors import first_line

from ..probe.causes import Kind, ObstacleError
from .operators.alone import alone
from .operators.base import Contraction, Refused, Swapped, in_front
from .operators.products import PRODUCTS
from .operators.rules import DROPOUT, Rules
from .program.program import LengthNumber, Op, Program, Size, Tables, map_args
from .values import KEY, LOCAL, NEW, Axis, Lengths, Value, laid

Weight = Callable[[Op], Tensor]  # the module's own parameter or buffer, or a constant of the trace


class Interpreter(Rules):
    """Runs the operators of a program in order."""

    def __init__(self, program: Program, lengths: Lengths, weight: Weight) -> None:
        super().__init__(lengths)
        self.program = program
        self._weight = weight
        self._plain: dict[Op, Any] = {}
        self.known: dict[Op, Any] = {}

    def value_of(self, op: Op) -> Any:
        """The operand that the rules get for an operator: a value, or the Op itself if it is a table."""
        if op in self.known:
            return self.known[op]
        if op.timed:
            return op
        plain = self._plainly(op)
        found = _wrapped(plain) if isinstance(plain, Tensor) else plain
        self.known[op] = found
        return found

    def _plainly(self, op: Op) -> Any:
        """Computes an operator that depends on weights only, as the author wrote it."""
        if op in self._plain:
            return self._plain[op]
        if isinstance(op.target, str):  # an input
            result: Any = in_float32(self._weight(op))
        elif any(i.timed for i in op.inputs) or _has_size((op.args, op.kwargs)):
            result = self.fixed(op)
        else:
            args, kwargs = map_args((op.args, op.kwargs), self._plainly, lambda size: size.at(0))
            result = op.target(*args, **kwargs)
        self._plain[op] = result
        return result

    def fixed(self, op: Op) -> Any:
        """A result without a time axis that depends on a table or on the length."""
        raise NotImplementedError


def in_float32(tensor: Tensor) -> Tensor:
    """Converts float16 and bfloat16 to float32, which is exact."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _wrapped(tensor: Tensor) -> Value:
    return Value(tensor, tuple(Axis(int(n)) for n in tensor.shape), batched=False)


def _has_size(args: Any) -> bool:
    found: list[Size] = []
    map_args(args, lambda op: op, found.append)
    return any(size.moves for size in found)


# Operators that move rows.
SHIFTING = {"slice", "cat", "concat", "concatenate", "pad", "constant_pad_nd", "conv1d", "convolution", "slice_scatter"}


def closes(op: Op, value: Any) -> bool:
    """Whether an operator returns shifted rows to the positions of their tokens."""
    if not isinstance(value, Value) or not value.local or op.name not in SHIFTING:
        return False
    return len(value.time_axes(NEW)) == 1 and value.axes[value.time_axes(NEW)[0]].shift == 0


# --- finding attention --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Layout:
    """The axes of an attention's scores as its author orders them: heads, queries and keys."""

    axes: tuple[Axis, ...]
    batch_axis: int | None

    @property
    def heads(self) -> tuple[int, ...]:
        return tuple(i for i, axis in enumerate(self.axes) if axis.time is None and i != self.batch_axis)

    @property
    def head_count(self) -> int:
        return math.prod(self.axes[i].size for i in self.heads)

    def spread(self, scores: Tensor) -> Value:
        """Scores (B, H, T, S) as a value with these axes."""
        sizes = [self.axes[i].size for i in self.heads]
        tensor = scores.reshape(scores.shape[0], *sizes, *scores.shape[2:]) if len(sizes) != 1 else scores
        order = [*self.heads, *(i for time in (NEW, KEY) for i, axis in enumerate(self.axes) if axis.time == time)]
        places = [1 + order.index(i) for i in range(len(self.axes)) if i != self.batch_axis]
        if places != sorted(places):
            tensor = tensor.permute([0, *places])
        return Value(tensor, self.axes, batch_axis=self.batch_axis)


def gathered(value: Value) -> Tensor:
    """The weights of an attention as (B, H, T, S)."""
    value = value.real()
    heads = [i for i, axis in enumerate(value.axes) if axis.time is None and i != value.batch_axis]
    order = [*heads, *value.time_axes(NEW), *value.time_axes(KEY)]
    tensor = value.tensor if value.batched else value.tensor[None]
    base = 1 - int(value.batched)
    places = [base + value.dim(i) for i in order]
    if places != sorted(places):
        tensor = tensor.permute([0, *places])
    if len(heads) != 1:
        tensor = tensor.reshape(tensor.shape[0], math.prod(value.axes[i].size for i in heads), *tensor.shape[-2:])
    return tensor


@dataclass(frozen=True)
class FollowedAttention:
    """One attention: its products q kᵀ, the operators that make weights of them, and the sum of weighted values."""

    op: Op  # the sum
    products: tuple[Op, ...]
    region: tuple[Op, ...]  # the operators from the products to the weights, without the products
    letters: Contraction  # of the sum
    weights: Op  # which the sum reads
    layouts: tuple[Layout, ...] = ()  # of the products


class Whole(Interpreter):
    """Runs a whole sequence without a cache. Finds each attention, and each obstacle to a cache."""

    def __init__(
        self, program: Program, ids: Tensor, weight: Weight, swapped: set[Op], both: frozenset[Op] = frozenset()
    ) -> None:
        length = int(ids.shape[1])
        super().__init__(program, Lengths(length, length), weight)
        self.swapped = swapped
        self._both = both  # products that failed with their rows and with their columns as the keys
        self.tables = Tables(length)
        self._other = Tables(program.lengths[1] if length == program.lengths[0] else program.lengths[0])
        self.found: list[FollowedAttention] = []
        self.tabled: dict[Op, Value] = {}  # tables that are the weights of an attention
        self.refused: list[ObstacleError] = []
        self._doubtful: set[Op] = {op for op in program.ops if op.target in program.mutated}
        self._layouts: dict[Op, Layout] = {}
        self._same: dict[Op, bool] = {}
        self.ids = ids
        self.shifts = True
        self.local: set[Op] = set()  # operators whose rows are being shifted
        self.shifted_back: list[Op] = []  # operators that return shifted rows to their positions

    def run(self) -> None:
        """Raises Swapped. After an unsupported operator it continues as if the result were rows of the new tokens."""
        for op in self.program.ops:
            if op.target == "ids":
                self.known[op] = Value(self.ids, (Axis(1), Axis(1, NEW)), batch_axis=0)
            elif op.depends:
                self.known[op] = self._one(op)

    def _one(self, op: Op) -> Any:
        if any(self.known.get(i, 0) is None for i in op.inputs if i.depends):
            return None  # depends on an unsupported operator
        if any(i in self._doubtful for i in op.inputs):
            return self._assumed(op)
        try:
            changing = self._changing(op)
            if changing is not None and op.name in PRODUCTS:
                raise Refused(
                    op,
                    "multiplies by rows that are counted from the end of the text (relative positions that shift their "
                    "scores, say): multiply each query by the row of its distance to each key instead",
                )
            if changing is not None:
                raise Refused(changing, "computes a different table for a longer text", Kind.LENGTH)
            value = self.apply(op, self.value_of)
            if any(isinstance(v, Value) and v.local for v in (value if isinstance(value, list) else [value])):
                self.local.add(op)
            if closes(op, value):
                self.local.remove(op)
                self.shifted_back.append(op)
                return value.with_(products=value.products - {LOCAL})
            return value
        except Swapped as found:
            if not found.products <= self._both:
                raise
            refused: ObstacleError = Refused(
                found.op,
                f"computes {found.op.name.strip('_')} over the queries, including those of later tokens",
                Kind.LOOK_AHEAD,
            )
        except Refused as rule:
            refused = alone(rule, self.tables)
        except ObstacleError as obstacle:
            refused = obstacle
        except Exception as error:  # torch may raise anything in cases that the rules miss
            if self.refused or self.program.mutated:  # assumed numbers may be the reason
                return self._assumed(op)
            refused = Refused(op, f"computes {op.name} in a way that cannot be followed ({first_line(error)[:100]})")
        self.refused.append(refused)
        return self._assumed(op)

    def _assumed(self, op: Op) -> Any:
        """A stand-in for the result of an unsupported operator: zeros of the shapes in the trace."""
        found = [self.known.get(i) for i in op.inputs]
        sources = [v for part in found for v in (part if isinstance(part, list) else [part]) if isinstance(v, Value)]
        if op.name in DROPOUT:
            return _undropped(op, sources[0])
        values = [None if shape is None else self._rows(op, shape, sources) for shape in op.shapes]
        lost = not op.timed and any(i.timed for i in op.inputs if i.depends)
        if lost or any(value is not None and value.time_axes(KEY) for value in values):
            self._doubtful.add(op)
        return values if any(user.name == "getitem" for user in op.users) else values[0]

    def _rows(self, op: Op, shape: Sequence[Size | LengthNumber], sources: Sequence[Value]) -> Value | None:
        """Zeros: a first axis of the length holds the new tokens, a second one all tokens."""
        moving = [i for i, size in enumerate(shape) if size.moves]
        if any(shape[i] != Size(1, 0) for i in moving) or len(moving) > 2 or any(v.lifted for v in sources):
            return None
        same = [v.batch_axis for v in sources if len(v.axes) == len(shape) and v.batch_axis is not None]
        batch = next(iter(same or [v.batch_axis for v in sources if v.batch_axis == 0]), None)
        if batch is not None and (batch >= len(shape) or shape[batch] != Size(0, 1)):
            batch = None
        axes = [Axis(1, NEW if i == moving[0] else KEY) if i in moving else Axis(s.at(0)) for i, s in enumerate(shape)]
        sizes = [self.lengths.new if axis.time else axis.size for i, axis in enumerate(axes) if i != batch]
        scores = [v.scores for v in sources if len(moving) == 2]
        zeros = torch.zeros(len(self.ids), *sizes, dtype=op.dtype)
        return Value(zeros, tuple(axes), batch_axis=batch, products=frozenset().union(*scores))

    def _changing(self, op: Op) -> Op | None:
        """The first operator that makes the rows of a table operand differ at another length; None if none does."""
        values = [self.known[i] for i in op.inputs if i in self.known]
        if any(isinstance(v, Value) and v.scores for v in values):  # a softmax may cancel the difference
            return None
        for table in (i for i in op.inputs if not i.depends and i.timed):
            if self._same_rows(table):
                continue
            while (source := next((i for i in table.inputs if i.timed and not self._same_rows(i)), None)) is not None:
                table = source
            return table
        return None

    def _same_rows(self, table: Op) -> bool:
        if table not in self._same:
            first, second = self.tables(table), self._other(table)
            same = True
            if isinstance(first, Tensor) and all(not s.moves or s == Size(1, 0) for s in table.shape):
                common = tuple(slice(0, min(a, b)) for a, b in zip(first.shape, second.shape, strict=True))
                one, other = in_float32(first[common]), in_float32(second[common])
                same = torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)
            self._same[table] = same
        return self._same[table]

    def table(self, op: Op, times: Sequence[str | None]) -> Value:
        return laid(in_float32(self.tables(op)), op.shape, times)

    def fixed(self, op: Op) -> Any:
        first, second = self.tables(op), self._other(op)
        if isinstance(first, Tensor) and not torch.equal(first, second):
            raise Refused(op, "computes with a number made from the length of the text", Kind.LENGTH)
        return first

    def product(self, op: Op, a: Value, b: Value, letters: Contraction) -> Value:
        value = self.multiplied(op, a, b, letters)
        keys = letters[0] if op in self.swapped else letters[1]
        source = a if op in self.swapped else b
        letter = next(x for i, x in enumerate(keys) if source.axes[i].time == NEW and x in letters[2])
        axes = list(value.axes)
        at = letters[2].index(letter)
        axes[at] = Axis(axes[at].size, KEY, axes[at].outer, axes[at].inner)
        shift = max(axis.shift for axis in axes)
        if shift > 0:
            raise Refused(op, in_front(shift))
        if not all(axis.plain_time for axis in axes if axis.time):
            raise Refused(op, "multiplies merged axes of positions")
        self._layouts[op] = Layout(tuple(axes), value.batch_axis)
        return value.with_(axes=tuple(axes), products=frozenset({op}))

    def weighted(self, op: Op, weights: Value | Op, values: Value, letters: Contraction) -> Value:
        if isinstance(weights, Op):
            return self._weighted_by_table(op, weights, values, letters)
        if values.scores:
            raise Refused(op, "multiplies scores with scores")
        reads = next(a for a in op.inputs if self.known.get(a) is weights)
        products = tuple(sorted(weights.scores, key=lambda p: p.number))
        region = _between(reads, products, self.known)
        self.found.append(
            FollowedAttention(op, products, region, letters, reads, layouts=tuple(self._layouts[p] for p in products))
        )
        return self.multiplied(op, weights.with_(products=frozenset()), values, letters)

    def _weighted_by_table(self, op: Op, table: Op, values: Value, letters: Contraction) -> Value:
        """Weights from a table, e.g. the average of all earlier tokens: attention with queries and keys of 0."""
        key = letters[1][values.time_axes(NEW)[0]]
        times = [(KEY if x == key else NEW) if s.moves else None for x, s in zip(letters[0], table.shape, strict=True)]
        if times.count(NEW) != 1 or times.count(KEY) != 1:
            raise Refused(op, "sums positions by a table of numbers, without queries and keys")
        laid = self.lay_exactly(op, table, times)
        self.tabled[table] = laid
        self.found.append(FollowedAttention(op, (), (), letters, table))
        return self.multiplied(op, laid, values, letters)


def _undropped(op: Op, value: Value) -> Any:
    """The result of dropout outside training, with None for its mask if it returns one."""
    return value if len(op.shapes) == 1 else [value, *[None] * (len(op.shapes) - 1)]


def _between(weights: Op, products: Sequence[Op], known: Mapping[Op, Any]) -> tuple[Op, ...]:
    """The operators from the products to the weights."""
    found: set[Op] = set()
    stack = [weights]
    while stack:
        op = stack.pop()
        if op in found or op in products or not op.depends:
            continue
        value = known[op]
        parts = value if isinstance(value, list | tuple) else [value]
        if not any(isinstance(v, Value) and (v.scores or v.time_axes(KEY)) for v in parts):
            continue  # a value of the new tokens that the weights read
        found.add(op)
        stack.extend(op.inputs)
    return tuple(sorted(found, key=lambda op: op.number))


# --- the weights of one attention ---------------------------------------------------------------------------------
class Weights(Interpreter):
    """Turns scores (B, H, T, S) of each product into weights (B, H', T, S), for the last T of S tokens."""

    def __init__(
        self,
        program: Program,
        attention: FollowedAttention,
        lengths: Lengths,
        weight: Weight,
        full: Callable[[Op], Tensor],
    ) -> None:
        super().__init__(program, lengths, weight)
        self._attention = attention
        self._full = full  # a table for the whole context

    def run(self, scores: Sequence[Tensor], others: Mapping[Op, Any]) -> Tensor:
        """Returns the weights. `others` are values of the new tokens that the operators also read."""
        for op, given, layout in zip(self._attention.products, scores, self._attention.layouts, strict=False):
            self.known[op] = layout.spread(given)
        for op in self._attention.region:
            for source in op.inputs:
                if source.depends and source not in self.known:
                    self.known[source] = others[source]
            self.known[op] = self.apply(op, self.value_of)
        weights = self._attention.weights
        if weights.depends:
            return gathered(self.known[weights])
        times = [
            self._times_of(letter) if s.moves else None
            for letter, s in zip(self._attention.letters[0], weights.shape, strict=True)
        ]
        return gathered(self.table(weights, times))

    def apply(self, op: Op, known: Callable[[Op], Any]) -> Any:
        """Skips dropout, which `Whole` refuses, so that the weights still show which tokens they see."""
        return _undropped(op, known(op.args[0])) if op.name in DROPOUT else super().apply(op, known)

    def _times_of(self, letter: str) -> str:
        """The kind of a time axis of a weight table: the axis that is summed holds the keys."""
        return NEW if letter in self._attention.letters[2] else KEY

    def table(self, op: Op, times: Sequence[str | None]) -> Value:
        tensor = self._full(op)
        new, total = self.lengths.new, self.lengths.total
        for i, time in enumerate(times):
            if time is not None:  # by index: a slice would make torch assume a bound on the length
                tensor = tensor.index_select(i, torch.arange(total - new if time == NEW else 0, total))
        return laid(in_float32(tensor), op.shape, times)

    def fixed(self, op: Op) -> Any:
        return self._full(op)

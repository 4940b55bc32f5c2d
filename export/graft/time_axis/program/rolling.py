"""Rolls up the loops of one trace: one body replaces all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ...probe.causes import Cause, Kind, ObstacleError
from .loops import Loop, is_zero, nodes_in, row_of, text_rows, token_before, token_row
from .nodes import Traced

aten = torch.ops.aten

_ADVICE = ": where a value is carried on for two tokens, carry a copy of it, value.clone()"
_JOINS = (aten.stack.default, aten.cat.default, aten.concat.default, aten.concatenate.default)


@dataclass(frozen=True)
class _Place:
    """Where a value is computed: operator `call` of the body of a token."""

    loop: int
    token: int
    call: int


class Roller:
    """Rolls up the loops of one trace.

    Attributes:
        stands: Value of the last body -> its stand-in behind the loop.
    """

    def __init__(self, nodes: Sequence[Traced], loops: Sequence[Loop], length: int, outputs: Sequence[fx.Node]) -> None:
        self._calls = [traced for traced in nodes if traced.kind == "call"]
        self._given = {traced.node: traced for traced in nodes}
        self._loops, self._length, self._outputs = loops, length, outputs
        self._graph = fx.Graph()
        self._made: list[Traced] = []
        self.stands: dict[fx.Node, fx.Node] = {}
        self._templates: dict[tuple[int, int], fx.Node] = {}  # (loop, call) -> value of each token
        self._beginnings: dict[fx.Node, fx.Node] = {}
        self._places: dict[fx.Node, _Place] = {}
        for number, loop in enumerate(loops):
            for token, body in enumerate(loop.bodies(self._calls)):
                for call, traced in enumerate(body):
                    if traced is not None:
                        self._places[traced.node] = _Place(number, token + loop.skipped, call)
        self._depends: set[fx.Node] = set()
        for traced in nodes:
            if traced.kind == "ids" or not self._depends.isdisjoint(nodes_in((traced.args, traced.kwargs))):
                self._depends.add(traced.node)
        self._first: fx.Node | None = None
        self._timed: set[fx.Node] = set()  # operators of templates that read or write the row of their token

    def run(self) -> list[Traced]:
        """The nodes with one body for each loop. Raises ObstacleError for a loop that cannot be rolled up."""
        at = 0
        for number, loop in enumerate(self._loops):
            for traced in self._calls[at : loop.start]:
                self._outside(traced)
            at = loop.end
            self._roll(number, loop)
        for traced in self._calls[at:]:
            self._outside(traced)
        made = {traced.node: traced for traced in self._made}
        read, stack = set[fx.Node](), [self.stands.get(node, node) for node in self._outputs]
        while stack:
            node = stack.pop()
            if node not in read and node in made:
                traced = made[node]
                stack += [*nodes_in((traced.args, traced.kwargs)), *([traced.back] if traced.back is not None else [])]
            read.add(node)
        given = (traced for traced in self._given.values() if traced.kind in ("ids", "weight") or traced.node in read)
        return [*(traced for traced in given if traced.kind != "call"), *(t for t in self._made if t.node in read)]

    def _make(
        self, like: Traced, target: Any, args: tuple[Any, ...], value: Tensor, back: fx.Node | None = None
    ) -> fx.Node:
        node = self._graph.placeholder(f"made_{len(self._made)}")
        node.meta = dict(like.node.meta) | {"val": value}
        self._made.append(Traced(node, "call", target, args, back=back))
        return node

    # --- behind a loop
    def _outside(self, traced: Traced) -> None:
        found = self._parts(traced)
        if any(place.token < self._length - 1 for place in found):
            made = dataclasses.replace(traced, target=text_rows, args=self._collected(traced), kwargs={})
        else:
            given = (traced.args, traced.kwargs)
            args, kwargs = fx.node.map_arg(given, lambda node: self._last(traced, node))
            made = dataclasses.replace(traced, args=args, kwargs=kwargs)
        self._made.append(made)

    def _parts(self, traced: Traced) -> list[_Place]:
        """Where a join has its parts from, as far as they are of loops."""
        parts = traced.args[0] if traced.target in _JOINS else ()
        return [self._places[part] for part in parts if part in self._places]

    def _last(self, traced: Traced, node: fx.Node) -> fx.Node:
        place = self._places.get(node)
        if place is None:
            return node
        if place.token != self._length - 1:
            _refuse(traced, f"reads the value of the loop at token {place.token} of {self._length} only")
        if node not in self.stands:
            _refuse(traced, "reads the last value of the loop over tokens, which is not known for a single token")
        return self.stands[node]

    def _collected(self, traced: Traced) -> tuple[Any, ...]:
        """The arguments of text_rows instead of a join of the rows of all tokens."""
        parts, kept = traced.args[0], traced.target is not aten.stack.default
        dim = traced.args[1] if len(traced.args) > 1 else traced.kwargs.get("dim", 0)
        places = [self._places.get(part) for part in parts]
        last = next(place for place in reversed(places) if place is not None)
        loop = self._loops[last.loop]
        value = self._value(parts[-1])
        whole = [_Place(last.loop, token, last.call) for token in range(self._length)]
        if len(parts) != self._length or (kept and value.shape[dim] != 1):
            _refuse(traced, f"joins {len(parts)} parts, where the text has {self._length} tokens, one row each")
        template = self._templates[last.loop, last.call]
        if places == whole[:1] * (not loop.skipped) + whole[1:]:
            row = template
        elif places[loop.skipped :] == whole[loop.skipped :]:
            row = self._since_first(traced, parts[0], template)
        elif places[0] is None and places[1:] == whole[:-1]:
            row = self._from_first(traced, parts[0], self._before(traced, template))
        else:
            _refuse(traced, "puts the tokens into another order than the text's", Kind.LOOK_AHEAD)
        return row, dim % traced.value.dim(), kept

    # --- a loop
    def _roll(self, number: int, loop: Loop) -> None:
        bodies = loop.bodies(self._calls)
        template, beginnings = [traced for traced in bodies[1] if traced is not None], dict[int, fx.Node]()
        token = loop.skipped + 1
        for i, body in enumerate(bodies):
            for one, other in zip(template, body, strict=True):
                if other is not None:
                    self._compare(one, other, token, i + loop.skipped, number, beginnings)
        crossing = {}
        for call, beginning in beginnings.items():
            node = self._before(template[call], template[call].node)
            crossing[call] = node if loop.skipped else self._from_first(template[call], beginning, node)
        known: dict[fx.Node, fx.Node] = {}

        def read(node: fx.Node) -> fx.Node:
            place = self._places.get(node)
            if place is None:
                return node
            if place.loop != number:
                return self._templates[place.loop, place.call]
            return known[node] if place.token == token else crossing[place.call]

        for call, traced in enumerate(template):
            known[traced.node] = self._body(traced, read, beginnings.get(call) if loop.skipped else None)
        ends = {call: known[traced.node] for call, traced in enumerate(template)}
        for call, beginning in beginnings.items() if loop.skipped else ():
            if template[call].node not in self._timed:
                ends[call] = self._since_first(template[call], beginning, ends[call])
        backs = {template[call].node: ends[call] for call in beginnings}
        self._made = [dataclasses.replace(t, back=backs.get(t.back, t.back)) if t.back else t for t in self._made]
        for call, last in enumerate(bodies[-1]):
            self._templates[number, call] = ends[call]
            if last is not None and (not loop.skipped or call in beginnings):
                self.stands[last.node] = ends[call]

    def _body(self, traced: Traced, read: Callable[[fx.Node], fx.Node], beginning: fx.Node | None) -> fx.Node:
        """Adds an operator of the body that replaces all. Returns its value.

        `beginning`: of a loop that begins with the second token, the tensor into which it writes its rows.
        """
        args, kwargs = fx.node.map_arg((traced.args, traced.kwargs), read)
        found = row_of(traced) if traced.node in self._timed else None
        if found is not None and not found[4]:
            source, dim, _, kept, _ = found
            return self._make(traced, token_row, (self._along(traced, read(source), dim), dim, kept), traced.value)
        if found is not None:
            _, dim, _, kept, _ = found
            row = args[1]
            if beginning is not None:
                written = row_of(self._given[beginning])
                first = (
                    self._given[beginning].args[1]
                    if written is not None and written[1:] == (dim, 0, kept, True)
                    else self._make(traced, token_row, (beginning, dim, kept), self._value(row))
                )
                row = self._since_first(traced, first, row)
            return self._make(traced, text_rows, (row, dim, kept), traced.value)
        if traced.target is aten.copy.default and self._value(traced.args[1]).dtype == traced.value.dtype:
            return self._make(traced, aten.expand.default, (args[1], list(traced.value.shape)), traced.value)
        self._made.append(dataclasses.replace(traced, args=args, kwargs=kwargs))
        return traced.node

    def _along(self, traced: Traced, source: fx.Node, dim: int) -> fx.Node:
        """A table that is longer than the text, cut to the text."""
        value = self._value(source)
        if value.shape[dim] == self._length:
            return source
        sizes = [self._length if i == dim % value.dim() else n for i, n in enumerate(value.shape)]
        cut = torch.empty(sizes, dtype=value.dtype, device="meta")
        return self._make(traced, aten.slice.Tensor, (source, dim, 0, self._length), cut)

    def _compare(
        self, one: Traced, other: Traced, token: int, at: int, number: int, beginnings: dict[int, fx.Node]
    ) -> None:
        """Raises ObstacleError if the bodies of tokens `token` and `at` differ in an operator."""
        shapes = [[getattr(v, "shape", None) for v in _several(traced.value)] for traced in (one, other)]
        if shapes[0] != shapes[1]:
            _refuse(one, "computes a value that grows with each token: collect it in a list, and stack it behind it")
        rows = row_of(one), row_of(other)
        timed = rows[0] is not None and rows[1] is not None and rows[0][2] != rows[1][2]
        if timed and (rows[0][2], rows[1][2]) != (token, at):  # type: ignore[index]
            away = rows[0][2] - token  # type: ignore[index]
            told = f"the row {abs(away)} {'before' if away < 0 else 'behind'} its own token"
            _refuse(one, f"reads {told}: carry it in a variable from token to token instead")
        if timed:
            self._timed.add(one.node)
        pairs = zip(tree_leaves((one.args, one.kwargs)), tree_leaves((other.args, other.kwargs)), strict=False)
        for a, b in pairs:
            if isinstance(a, fx.Node) and isinstance(b, fx.Node):
                self._compare_nodes(one, a, b, token, at, number, beginnings)
            elif not timed and (type(a) is not type(b) or (a != b and a == a)):
                numbers = f"a number that changes with the position ({a}, then {b})"
                _refuse(one, f"computes with {numbers}: read it from a tensor of positions, torch.arange(T)[t]")

    def _compare_nodes(
        self, one: Traced, a: fx.Node, b: fx.Node, token: int, at: int, number: int, beginnings: dict[int, fx.Node]
    ) -> None:
        place, other = self._places.get(a), self._places.get(b)
        for found, its in ((place, token), (other, at)):
            if found is None or found.token == its or (found.loop == number and found.token == its - 1):
                continue
            if found.loop == number or at > self._loops[number].skipped:
                _refuse(one, f"reads a value of a loop for another token than this one and the one before{_ADVICE}")
        if place is None or other is None:
            same = place is other and (a is b or _equal(self._given.get(a), self._given.get(b)))
        else:
            same = (place.loop, place.call, place.token - token) == (other.loop, other.call, other.token - at)
        if not same and place is not None and place.token < token and at == self._loops[number].skipped:
            same = beginnings.setdefault(place.call, b) is b
        if not same:
            _refuse(one, "reads other values for some tokens than for others")

    # --- the beginning of a loop
    def _from_first(self, traced: Traced, beginning: fx.Node, other: fx.Node) -> fx.Node:
        """The beginning for the first token, and `other` for the others."""
        if is_zero(beginning):  # as the runtime's states are
            return other
        return self._since_first(traced, beginning, other)

    def _since_first(self, traced: Traced, beginning: fx.Node, other: fx.Node) -> fx.Node:
        if self._first is None:
            count, answers = (
                torch.empty(self._length, dtype=kind, device="meta") for kind in (torch.int64, torch.bool)
            )
            positions = self._make(traced, aten.arange.default, (self._length,), count)
            zero = self._make(traced, aten.eq.Scalar, (positions, 0), answers)
            self._first = self._make(traced, token_row, (zero, 0, False), answers[0])
        args = (self._first, self._begun(beginning), other)
        return self._make(traced, aten.where.self, args, self._value(other))

    def _begun(self, node: fx.Node) -> fx.Node:
        """The value of a node for the first token, as if each token were the first."""
        place = self._places.get(node)
        if place is not None:
            return self._templates[place.loop, place.call]
        if node not in self._depends or node in self._beginnings:
            return self._beginnings.get(node, node)
        traced = self._given[node]
        found = row_of(traced)
        if found is not None and found[2] == 0 and self._value(found[0]).shape[found[1]] == self._length:
            made = self._make(traced, token_row, (found[0], found[1], found[3]), traced.value)
        elif traced.kind != "call" or self._length in getattr(traced.value, "shape", ()):
            return node
        else:
            args, kwargs = fx.node.map_arg((traced.args, traced.kwargs), self._begun)
            made = self._make(traced, traced.target, args, traced.value)
            self._made[-1] = dataclasses.replace(self._made[-1], kwargs=kwargs)
        self._beginnings[node] = made
        return made

    def _before(self, traced: Traced, back: fx.Node) -> fx.Node:
        return self._make(traced, token_before, (), self._value(back), back)

    def _value(self, node: fx.Node) -> Tensor:
        value: Tensor = node.meta["val"]
        return value


def _equal(one: Traced | None, other: Traced | None) -> bool:
    """Whether both are the same constant, which each body makes anew."""
    constants = [None if traced is None else traced.constant for traced in (one, other)]
    return constants[0] is not None and constants[1] is not None and torch.equal(constants[0], constants[1])


def _several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _refuse(traced: Traced, what: str, kind: Kind = Kind.RECURRENCE) -> NoReturn:
    raise ObstacleError(Cause(kind, f"is a loop over tokens that {what}", traced.where, traced.owner))

"""Traces a module's uncached computation of one row, at two lengths, into a list of operators.

torch traces at fixed lengths, so `len(x)`, indices computed from T and Python loops over heads need no special rule.
A number that differs between the two traces depends on the length: a·T + b. If the operators differ, the module's
Python code loops over positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions

from pastkey.errors import ContractError
from pastkey.quiet import quiet

from ...attention import intercept
from ...probe.causes import Cause, Kind, NoCacheError, ObstacleError
from ...probe.observe import name_of
from .cells import CELLS
from .distribution import Recurrence, distributed
from .loops import find_loops, token_before, token_row
from .nodes import Traced, flat, folded, forms
from .op import LengthNumber as LengthNumber
from .op import Op as Op
from .op import Size as Size
from .op import map_args as map_args
from .python_branches import Heard, Replay, heard
from .rolling import Roller
from .traced import LogitsOf, different, patched, untraced, written_out

aten = torch.ops.aten


def _has_length_number(args: Any) -> bool:
    if isinstance(args, list | tuple):
        return any(_has_length_number(a) for a in args)
    if isinstance(args, dict):
        return any(_has_length_number(a) for a in args.values())
    return isinstance(args, LengthNumber)


@dataclass(frozen=True)
class Program:
    """The operators that the logits need, in order of execution."""

    ops: tuple[Op, ...]
    ids: Op
    logits: Op
    lengths: tuple[int, int]  # of the two traces
    mutated: tuple[str, ...] = ()  # buffers that the module writes
    writes: tuple[Op, ...] = ()  # the new value of each


class Tables:
    """The values of operators that do not depend on the ids, at one length, each computed once."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._known: dict[Op, Any] = {}

    def __call__(self, op: Op) -> Any:
        if op in self._known:
            return self._known[op]
        stack = [op]
        while stack:
            top = stack[-1]
            waiting = [i for i in top.inputs if i not in self._known]
            if waiting:
                stack.extend(waiting)
                continue
            stack.pop()
            if top not in self._known:
                self._known[top] = self._run(top)
        return self._known[op]

    def _run(self, op: Op) -> Any:
        if op.constant is not None:
            return op.constant
        if op.at_length is not None:
            return op.at_length(self.length)
        if _has_length_number((op.args, op.kwargs)):
            what = "computes with a number made from the length of the text, such as T // 2 or 1 / T"
            raise ObstacleError(Cause(Kind.LENGTH, what, op.where, op.owner))
        args, kwargs = map_args((op.args, op.kwargs), self._known.__getitem__, lambda size: size.at(self.length))
        with torch.no_grad():
            made = op.target(*args, **kwargs)
        return made.zero_() if op.name in _UNFILLED else made


# Tensors of whatever was in memory, which differs between runs: the author writes into them before they are read.
_UNFILLED = ("empty", "empty_like", "new_empty", "empty_permuted", "empty_strided")


# --- tracing ------------------------------------------------------------------------------------------------------
def trace_program(module: nn.Module, call: LogitsOf, lengths: tuple[int, int], vocab_size: int) -> Program:
    """Traces `call(module, ids)` at both lengths. Raises NoCacheError if torch cannot, or if the traces differ."""
    traced = [_export(module, call, length, vocab_size) for length in lengths]
    first, second = ([*flat(program)] for program in traced)
    tables = forms(first) != forms(second)
    stands: dict[fx.Node, fx.Node] = {}
    unrolled = False  # whether a loop over tokens is in the traces
    if tables:
        parts = folded(first), folded(second)
        tables = forms(parts[0]) == forms(parts[1])
        unrolled = not tables
        if tables:
            first, second = parts
        else:
            ends = [program.graph_module.graph.output_node().all_input_nodes for program in traced]
            first, second, stands = _rolled(module, (first, second), lengths, ends)

    @functools.cache
    def constants(length: int) -> dict[str, Tensor | None]:
        nodes = [*flat(_export(module, call, length, vocab_size))]
        return {node.name: node.constant for node in (folded(nodes) if tables else nodes) if node.kind != "call"}

    def again(name: str, shape: Any, length: int) -> Tensor:
        """A constant of the trace at another length."""
        found = constants(length).get(name)
        if found is None or any(
            isinstance(s, LengthNumber) or s.at(length) != n for s, n in zip(shape, found.shape, strict=True)
        ):
            raise ObstacleError(Cause(Kind.LENGTH, "makes a table in Python that is not known for every length"))
        return found

    ops: dict[Any, Op] = {}
    for one, other in zip(first, second, strict=True):
        ops[one.node] = _pair(one, other, ops, lengths, functools.partial(again, one.name))
    for one in first:
        ops[one.node].back = None if one.back is None else ops[one.back]
    mutated = tuple(traced[0].graph_signature.buffers_to_mutate.values())
    outputs = traced[0].graph_module.graph.output_node().args[0]
    ops |= {last: ops[node] for last, node in stands.items() if node in ops}
    logits = ops[outputs[len(mutated)]]
    ids = next(op for op in ops.values() if op.target == "ids")
    try:
        live = _live(logits, distributed(logits, ids) if unrolled else ops.values())
    except ObstacleError as obstacle:
        raise NoCacheError(name_of(module), [obstacle.cause]) from obstacle
    # A buffer that no logits read, such as a count of calls, is no state.
    read = {op.target for op in live if isinstance(op.target, str)}
    written = [(name, ops[node]) for name, node in zip(mutated, outputs, strict=False) if name in read]
    names, writes = tuple(name for name, _ in written), tuple(op for _, op in written)
    return Program(live, ids, logits, lengths, names, writes)


def _rolled(
    module: nn.Module,
    traces: tuple[list[Traced], list[Traced]],
    lengths: tuple[int, int],
    ends: Sequence[list[fx.Node]],
) -> tuple[list[Traced], list[Traced], dict[fx.Node, fx.Node]]:
    """Both traces with their loops over tokens rolled up, and the stand-ins for values of the first one's last bodies.

    Raises NoCacheError if they differ in another way.
    """
    calls = [[traced for traced in nodes if traced.kind == "call"] for nodes in traces]
    loops = find_loops(calls[0], calls[1], lengths)
    if loops is None:
        raise NoCacheError(name_of(module), different(lengths, *traces))
    try:
        rollers = [Roller(*each) for each in zip(traces, loops, lengths, ends, strict=True)]
        rolled = [roller.run() for roller in rollers]
    except ObstacleError as obstacle:
        raise NoCacheError(name_of(module), [obstacle.cause]) from obstacle
    if forms(rolled[0]) != forms(rolled[1]):
        raise NoCacheError(name_of(module), different(lengths, *traces))
    return rolled[0], rolled[1], rollers[0].stands


_OF_A_SHAPE = ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")

_LIKE = {
    "type_as": aten.to.dtype,
    "expand_as": aten.expand.default,
    "view_as": aten.view.default,
    "reshape_as": aten.reshape.default,
}


def _live(logits: Op, ops: Any) -> tuple[Op, ...]:
    needed, stack = {logits}, [logits]
    while stack:
        for op in stack.pop().inputs:
            if op not in needed:
                needed.add(op)
                stack.append(op)
    live = [made for op in ops if op in needed for made in (*(i for i in op.inputs if i.target is torch.zeros), op)]
    for number, op in enumerate(live):
        op.number = number
        op.depends = op.target in ("ids", token_row, token_before) or any(i.depends for i in op.inputs)
        for part in op.target.body if isinstance(op.target, Recurrence) else ():
            part.depends = True
            for i in part.inputs:
                i.users.append(part)
        for i in op.inputs:
            i.users.append(op)
    return tuple(live)


class _Called(nn.Module):
    """The author's call as a module of the ids only. `model` is named as in TimeAxisDecoder, for the weights' names."""

    def __init__(self, model: nn.Module, call: LogitsOf, told: Heard) -> None:
        super().__init__()
        self.model = model
        self._call = call
        self._told = told

    def forward(self, ids: Tensor) -> Tensor:
        with intercept(written_out), Replay(self._told):
            return self._call(self.model, ids)


def _export(module: nn.Module, call: LogitsOf, length: int, vocab_size: int) -> torch.export.ExportedProgram:
    ids = torch.arange(length)[None] % vocab_size
    try:
        told = heard(lambda text: call(module, text), length, vocab_size)
    except ObstacleError as obstacle:
        raise NoCacheError(name_of(module), [obstacle.cause]) from obstacle
    try:
        with torch.no_grad(), quiet(), patched():
            exported = torch.export.export(_Called(module, call, told).eval(), (ids,), strict=False)
            decompositions = get_decompositions([aten.addmm, aten.baddbmm, aten.addbmm]) | CELLS
            program: torch.export.ExportedProgram = exported.run_decompositions(decompositions)
            return program
    except ContractError:
        raise
    except Exception as error:
        raise NoCacheError(name_of(module), [untraced(error)]) from error


def _pair(
    one: Traced,
    other: Traced,
    ops: dict[Any, Op],
    lengths: tuple[int, int],
    again: Callable[[Any, int], Tensor],
) -> Op:
    def merge(a: Any, b: Any) -> Any:
        if isinstance(a, fx.Node):
            return ops[a]
        if isinstance(a, list | tuple):
            return [merge(x, y) for x, y in zip(a, b, strict=True)] if len(a) == len(b) else LengthNumber(a, b)
        if isinstance(a, dict):
            return {k: merge(a[k], b[k]) for k in a}
        if a == b or a != a:  # NaN
            return a
        if isinstance(a, bool) or not isinstance(a, int) or not isinstance(b, int):
            return LengthNumber(a, b)
        return size_of(a, b, lengths)

    values = [v if isinstance(v, list | tuple) else [v] for v in (one.value, other.value)]
    shapes = tuple(
        tuple(size_of(int(x), int(y), lengths) for x, y in zip(a.shape, b.shape, strict=True))
        if isinstance(a, Tensor)
        else None
        for a, b in zip(*values, strict=True)
    )
    args = tuple(merge(one.args, other.args))
    name = getattr(getattr(one.target, "overloadpacket", None), "__name__", "")
    if name in _OF_A_SHAPE and isinstance(args[0], Op):  # depends on the shape only
        source = args[0]
        empty = Op(torch.zeros, (list(source.shape),), {"dtype": source.dtype}, source.shapes[:1], source.dtype, "")
        args = (empty, *args[1:])
    if name in _LIKE and len(args) > 1 and isinstance(args[1], Op):  # depends on the other's shape or type only
        other_op = args[1]
        target, given = _LIKE[name], other_op.dtype if name == "type_as" else list(other_op.shape)
        args = (args[0], given)
    else:
        target = one.target
    constant = one.constant
    at_length = None
    if constant is not None and other.constant is not None and not _same(constant, other.constant):
        constant = None  # made by Python, or stored by the module, for this length
        at_length = functools.partial(again, shapes[0])
    first = values[0][0]
    return Op(
        target=target,
        args=args,
        kwargs=merge(one.kwargs, other.kwargs),
        shapes=shapes,  # type: ignore[arg-type]  # a LengthNumber raises when it is read
        dtype=first.dtype if isinstance(first, Tensor) else None,
        where=one.where,
        owner=one.owner,
        constant=constant,
        at_length=at_length,
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other))


def size_of(first: int, second: int, lengths: tuple[int, int]) -> Size | LengthNumber:
    """The a·T + b that gives `first` and `second` at the two lengths; else a LengthNumber."""
    slope, rest = divmod(second - first, lengths[1] - lengths[0])
    return LengthNumber(first, second) if rest else Size(slope, first - slope * lengths[0])

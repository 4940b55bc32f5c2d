"""Turns the author's call into a module of the contract: forward(input_ids, position_ids) -> logits (B, T, V).

The author's call computes a whole sequence; the decoder computes new tokens at given positions. It passes each
attention to `attend`, like a module that calls scaled_dot_product_attention. The export treats both alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import AttentionCall, attend
from ...probe.causes import Cause, Kind, NoCacheError
from ...probe.observe import StandIn, name_of
from ...probe.watched import without_autocast
from ..interpret import FollowedAttention, Weights, Whole, in_float32
from ..operators.base import Refused, Swapped
from ..program.program import LogitsOf, Op, Program, Tables, trace_program
from ..values import KEY, Lengths, Value
from .attention_form import GivenWeights, LooksAhead, Softmax, moved_by_later, recognised
from .latent import find_latent
from .state import State, find_state
from .step import Planned, Step

_EQUAL = 1e-7  # relative: measured scales that differ by less are equal
_ZEROS = 8  # the head size, the smallest of GroupQueryAttention
_LENGTHS = (31, 29)  # tokens of the two traces; unlikely as the size of a head or a window


class TimeAxisDecoder(StandIn):
    """forward(input_ids, position_ids) -> logits (B, T, V), for a module without a cache."""

    def __init__(self, model: nn.Module, call: LogitsOf, found: Found, context_length: int) -> None:
        super().__init__(model)
        self._call = call
        self._found = found
        self._native = False
        self._tables = _FullTables(self, context_length)
        for name, tensor in found.constants.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        if self._native:
            with without_autocast():
                return torch.cat([whole_logits(self.model, self._call, row[None]) for row in input_ids])
        found = self._found
        step = Step(
            found.program,
            found.plan,
            found.templates,
            self.weight,
            self._tables,
            self._constant,
            input_ids,
            position_ids,
            found.swapped,
            found.states,
        )
        logits = step.run()
        return logits if found.plan or step.kept else logits + _attention_of_zeros(logits)

    @contextlib.contextmanager
    def native(self) -> Iterator[None]:
        self._native = True
        try:
            yield
        finally:
            self._native = False

    def _constant(self, kind: str, number: int) -> Tensor:
        tensor: Tensor = getattr(self, f"{kind}_{number}")
        return tensor

    def weight(self, op: Op) -> Tensor:
        """A parameter, buffer or constant that the program reads."""
        if op.target == "constant":
            assert op.constant is not None
            return op.constant
        tensor: Tensor = operator.attrgetter(str(op.target))(self)
        return tensor


def _attention_of_zeros(logits: Tensor) -> Tensor:
    """Zeros (B, T, 1), for a module whose tokens read no earlier ones, such as a bigram.

    With one attention its bundle has a cache, which every program expects, and needs no separate case.
    """
    zeros = torch.zeros(logits.shape[0], 1, logits.shape[1], _ZEROS)
    call = AttentionCall(zeros, zeros, zeros, None, 0.0, True, scale=1.0, where="no attention")
    return attend(call)[:, 0, :, :1]


class _FullTables:
    """The tables for the whole context, as buffers of the decoder."""

    def __init__(self, owner: nn.Module, context_length: int) -> None:
        self._owner = [owner]  # no submodule
        self._tables = Tables(context_length)
        self._names: dict[Op, str] = {}
        self._counts: dict[Op, bool] = {}
        self._uniform: dict[Op, bool] = {}

    def __call__(self, op: Op) -> Tensor:
        if op not in self._names:
            tensor = in_float32(self._tables(op))
            self._names[op] = f"table_{len(self._names)}"
            self._owner[0].register_buffer(self._names[op], tensor.clone().contiguous(), persistent=False)
        found: Tensor = getattr(self._owner[0], self._names[op])
        return found

    def counts(self, op: Op) -> bool:
        if op not in self._counts:
            line = all(s.moves or s.b == 1 for s in op.shape)
            values = self._tables(op).flatten() if line else torch.empty(0)
            length = self._tables.length
            self._counts[op] = values.numel() == length and bool((values == torch.arange(length)).all())
        return self._counts[op]

    def uniform(self, op: Op) -> bool:
        if op not in self._uniform:
            table = self._tables(op)
            self._uniform[op] = bool((table == table.flatten()[0]).all())
        return self._uniform[op]


def whole_logits(model: nn.Module, call: LogitsOf, ids: Tensor) -> Tensor:
    """Logits (1, T, V) of the author's call; one that returns only the last position runs for each position."""
    logits = call(model, ids)
    if logits.shape[1] == ids.shape[1]:
        return logits.float()
    rows = [call(model, ids[:, : n + 1]) for n in range(ids.shape[1] - 1)]
    return torch.cat([*rows, logits], 1).float()


# --- finding ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Found:
    """A program with its attention and its states."""

    program: Program
    plan: dict[Op, Planned]
    templates: dict[Op, Value]
    swapped: set[Op]
    constants: dict[str, Tensor]  # scales, sinks and biases by kind and number
    states: tuple[State, ...] = ()


def find(model: nn.Module, call: LogitsOf, context_length: int, vocab_size: int, *, latents: bool = True) -> Found:
    """Traces the author's call and finds its attention and states. Raises NoCacheError with all causes.

    `latents`: whether a smaller row may be cached instead of keys and values.
    """
    lengths = tuple(max(2 - i, min(n, context_length - 1 - i)) for i, n in enumerate(_LENGTHS))
    program = trace_program(model, call, (lengths[0], lengths[1]), vocab_size)
    whole = _whole(program, vocab_size)
    causes = [*_written(program), *(refused.cause for refused in whole.refused)]
    states: list[State] = []
    for op in whole.shifted_back:
        try:
            states.append(find_state(program, op, whole.known, whole.local, _weight))
        except Refused as refused:
            causes.append(refused.cause)
    end = whole.known[program.logits]
    if isinstance(end, Value) and end.local:
        first = min(whole.local, key=lambda op: op.number)
        causes.append(Refused(first, "reads a part of the positions, and never the rest").cause)
    softmaxes: list[Softmax | None] = []
    seen: dict[Any, Softmax | None] = {}
    for attention in whole.found:
        try:
            softmaxes.append(_softmax(program, attention, context_length, seen))
            given = _weights_of(program, attention, Tables(context_length), whole.known)
            if attention.products and moved_by_later(given, _heads(attention), program.lengths[0]):
                causes.append(_reduces_later(attention, whole.known))
        except LooksAhead as found:
            causes.append(_looks_ahead(attention, found))
        except Exception:
            if not causes:  # otherwise it follows from a refusal
                raise
    if causes:
        raise NoCacheError(name_of(model), causes)
    plan: dict[Op, Planned] = {}
    constants: dict[str, Tensor] = {}
    for number, (attention, softmax) in enumerate(zip(whole.found, softmaxes, strict=True)):
        plan[attention.op] = _planned(attention, softmax, number, constants)
    skipped = {op for planned in plan.values() for op in (*planned.attention.region, *planned.attention.products)}
    templates = {op: whole.known[op] for op in skipped if op in whole.known} | whole.tabled
    tables = _FullTables(nn.Module(), context_length)

    def step_on(kind: type[Step], planned: Planned, positions: Tensor) -> Step:
        one = {planned.attention.op: planned}
        return kind(program, one, templates, _weight, tables, _no_constant, positions, positions, whole.swapped, ())

    for op, planned in plan.items() if latents else ():
        latent = find_latent(planned, whole.known, whole.swapped, step_on, context_length, constants)
        if latent is not None:
            plan[op] = dataclasses.replace(planned, latent=latent)
            templates |= {op: whole.known[op] for op in latent.between}
    return Found(program, plan, templates, whole.swapped, constants, tuple(states))


def _weight(op: Op) -> Tensor:
    """A parameter, buffer or constant, before the decoder exists."""
    assert op.constant is not None
    return op.constant


def _no_constant(kind: str, number: int) -> Tensor:
    raise AssertionError(f"{kind}_{number}")


def _whole(program: Program, vocab_size: int) -> Whole:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (2, program.lengths[0]), generator=generator)
    swapped: set[Op] = set()
    both: frozenset[Op] = frozenset()
    while True:
        run = Whole(program, ids, _weight, swapped, both)
        try:
            with torch.no_grad():
                run.run()
            return run
        except Swapped as found:
            if found.products <= swapped:
                both, swapped = both | found.products, swapped - found.products
            else:
                swapped = swapped | found.products


def _planned(
    attention: FollowedAttention, softmax: Softmax | None, number: int, constants: dict[str, Tensor]
) -> Planned:
    """The known form of an attention's weights; adds its tensors to `constants`."""
    if softmax is None:
        return Planned(attention, number)
    scale = float(softmax.scale.mean()) if attention.products else 1.0  # queries and keys are 0
    same = not attention.products or bool(((softmax.scale - scale).abs() <= _EQUAL * abs(scale)).all())
    if not same:
        constants[f"scale_{number}"] = softmax.scale.float()
    if softmax.sinks is not None:
        constants[f"sinks_{number}"] = softmax.sinks.float()
    if not softmax.plain:
        equal = bool((softmax.bias == softmax.bias[:1]).all())
        constants[f"bias_{number}"] = (softmax.bias[:1] if equal else softmax.bias).float().contiguous()
    return Planned(
        attention,
        number,
        known=True,
        scale=scale if same else None,
        window=softmax.window if softmax.plain else None,
        softcap=softmax.softcap,
        sinks=softmax.sinks is not None,
        bias=not softmax.plain,
    )


def _softmax(
    program: Program,
    attention: FollowedAttention,
    context_length: int,
    seen: dict[Any, Softmax | None],
) -> Softmax | None:
    """The form of an attention's weights, found by running them; None if it is unknown. Raises LooksAhead.

    `seen` caches the results: most layers have the same mask and scale.
    """
    reads = {i for op in attention.region for i in op.inputs if i.depends}
    if reads - set(attention.region) - set(attention.products):
        return None  # the weights also depend on other values of the tokens
    if any(op.name == "topk" for op in attention.region):
        return None  # a softmax of some of the scores
    tables = Tables(context_length)
    form = _form(attention, tables)
    if form in seen:
        return seen[form]

    heads = _heads(attention)
    seen[form] = recognised(_weights_of(program, attention, tables, {}), len(heads), heads, context_length)
    return seen[form]


def _heads(attention: FollowedAttention) -> tuple[int, ...]:
    """H of each product."""
    return tuple(layout.head_count for layout in attention.layouts) or (1,)


def _weights_of(
    program: Program, attention: FollowedAttention, tables: Tables, others: Mapping[Op, Any]
) -> GivenWeights:
    """Runs the operators that make an attention's weights of scores; `others` are values that they also read."""

    def given(scores: list[Tensor], total: int) -> Tensor:
        lengths = Lengths(scores[0].shape[2], total)
        with torch.no_grad():
            try:
                return Weights(program, attention, lengths, _weight, tables).run(scores, others)
            except RuntimeError:  # a float32 matrix cannot multiply float64
                return Weights(program, attention, lengths, _weight, tables).run([s.float() for s in scores], others)

    return given


def _form(attention: FollowedAttention, tables: Tables) -> Any:
    """A key that is equal for attentions that compute their weights in the same way."""
    own = {op: i for i, op in enumerate((*attention.products, *attention.region))}

    def told(args: Any) -> Any:
        if isinstance(args, Op):
            return ("op", own[args]) if args in own else ("table", _digest(tables(args)))
        if isinstance(args, list | tuple):
            return tuple(told(a) for a in args)
        return tuple((k, told(v)) for k, v in args.items()) if isinstance(args, dict) else repr(args)

    operators = tuple((op.name, told(op.args), told(op.kwargs)) for op in attention.region)
    return operators, told(attention.weights), attention.layouts, attention.letters


def _digest(table: object) -> object:
    if not isinstance(table, Tensor):
        return repr(table)
    numbers = torch.view_as_real(table.resolve_conj()) if table.is_complex() else in_float32(table)
    content = numbers.detach().contiguous().numpy().tobytes()
    return tuple(table.shape), str(table.dtype), hashlib.sha1(content).hexdigest()


def _written(program: Program) -> list[Cause]:
    """Causes for the buffers that each call writes: with values of the tokens, as a cache, or with other numbers."""
    places: dict[str, list[str]] = {}
    for name, op in zip(program.mutated, program.writes, strict=True):
        places.setdefault(op.where, []).append(name.removeprefix("model."))
    writers = {op.where: op for op in program.writes}
    return [
        Cause(
            Kind.WRITES if _reads(writers[where], program.ids) else Kind.STATE,
            f"writes into the buffer{'s' * (len(names) > 1)} {', '.join(names[:3])}",
            where,
            writers[where].owner,
        )
        for where, names in places.items()
    ]


def _reads(op: Op, source: Op) -> bool:
    """Whether an operator computes with `source`."""
    seen, stack = {op}, [op]
    while stack:
        new = {i for i in stack.pop().inputs if i not in seen}
        seen |= new
        stack.extend(new)
    return source in seen


def _looks_ahead(attention: FollowedAttention, found: LooksAhead) -> Cause:
    what = (
        f"lets the token at position {found.row} see that at {found.column}, a later one (attention, head {found.head})"
    )
    return Cause(Kind.LOOK_AHEAD, what, attention.op.where, attention.op.owner)


def _reduces_later(attention: FollowedAttention, known: Mapping[Op, Any]) -> Cause:
    """The cause of weights that scores of later tokens move: the first number of a row that is made of all scores."""

    def over_keys(op: Op) -> bool:
        found = known.get(op)
        return any(isinstance(v, Value) and v.time_axes(KEY) for v in (found if isinstance(found, list) else [found]))

    reduces = [op for op in attention.region if not over_keys(op) and any(over_keys(i) for i in op.inputs)]
    op = next(iter(reduces), attention.op)
    what = f"computes {op.name.strip('_')} over all scores before the mask hides those of later tokens"
    return Cause(Kind.LOOK_AHEAD, what, op.where, op.owner)

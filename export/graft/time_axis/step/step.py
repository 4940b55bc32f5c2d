"""One step of a decoder: runs the new tokens only, and hands each attention to the owner of the KV cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention import AttentionCall, RowsCall, attend, extend, repeated
from ..interpret import FollowedAttention, Interpreter, Layout, Weight, Weights
from ..operators.base import Contraction, Refused
from ..program.program import Op, Program, Size
from ..values import NEW, Axis, Lengths, Value
from .row import Latent, attend_latent
from .state import Shifted, State


class Full(Protocol):
    """The tables for the whole context."""

    def __call__(self, op: Op) -> Tensor: ...

    def counts(self, op: Op) -> bool:
        """Whether it is 0, 1, 2, ...: the positions themselves."""

    def uniform(self, op: Op) -> bool:
        """Whether all its numbers are equal."""


@dataclass(frozen=True)
class Planned:
    """An attention and the known form of its weights: numbers here, tensors as `Constant` of the decoder."""

    attention: FollowedAttention
    number: int
    known: bool = False  # the weights are softmax(cap(scale · scores) + bias)
    scale: float | None = 1.0  # None: one for each head
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    bias: bool = False  # more than a causal mask or a window
    latent: Latent | None = None


# By number: "scale" (products, H), "sinks" (H,), "bias" (H or 1, context), and the matrices of a latent row.
Constant = Callable[[str, int], Tensor]

_NOTHING = 8  # head size of the zero queries and keys of an attention without any


class Step(Interpreter):
    """Runs a program on new tokens (B, T) at given positions."""

    def __init__(
        self,
        program: Program,
        plan: Mapping[Op, Planned],
        templates: Mapping[Op, Value],
        weight: Weight,
        full: Full,
        constant: Constant,
        ids: Tensor,
        positions: Tensor,
        swapped: set[Op],
        states: Sequence[State],
    ) -> None:
        super().__init__(program, Lengths(ids.shape[1], None), weight)
        self._plan, self._templates, self._full, self._constant = plan, templates, full, constant
        self.ids, self._positions = ids, positions
        self.begins = positions[:, :1] == 0
        self.swapped = swapped
        self._operands: dict[Op, tuple[Value, Value, Contraction]] = {}
        self._rows: dict[tuple[Op, int], Value] = {}
        self._skipped = {op for planned in plan.values() for op in planned.attention.region}
        self._skipped |= {op for planned in plan.values() if planned.latent for op in planned.latent.between}
        self._states = {state.op: state for state in states}
        self._within = {op for state in states for op in state.between}

    def run(self) -> Tensor:
        """The logits (B, T, V)."""
        for op in self.program.ops:
            if op.target == "ids":
                self.known[op] = Value(self.ids, (Axis(1), Axis(1, NEW)), batch_axis=0)
            elif op in self._skipped:
                self.known[op] = self._templates[op]
            elif op in self._states:
                self.known[op] = self._shifted_back(self._states[op])
            elif op in self._within:
                continue
            elif op.depends:
                self.known[op] = self.apply(op, self.value_of)
        value = self.known[self.program.logits].real()
        tensor: Tensor = value.tensor
        if not value.lifted:
            tensor = tensor.movedim(value.dim(value.time_axes(NEW)[0]), 1)
        return tensor if tensor.dim() == 3 else tensor.reshape(tensor.shape[0], tensor.shape[1], -1)

    def _shifted_back(self, state: State) -> Value:
        """The new rows of a state, from the new rows and the cached rows of its inputs."""
        inputs = {}
        total = None
        for source in state.inputs:
            value = self.known[source].real()
            time = value.time_axes(NEW)[0]
            rows = value.tensor.movedim(value.dim(time), 1)
            kept = rows[..., None].flatten(2)
            if state.keep:
                kept = extend(RowsCall(kept.to(torch.float32), state.keep, state.op.where))
            total = kept.shape[1]
            kept = kept.to(rows.dtype).reshape(kept.shape[0], total, *rows.shape[2:])
            inputs[source] = value.with_(tensor=kept.movedim(1, value.dim(time)))
        value = Shifted(self.program, total, self._weight).run(state.between, state.op, inputs)
        new, at = self.lengths.new, value.dim(value.time_axes(NEW)[0])
        return value.with_(tensor=value.tensor.narrow(at, total - new, new))

    # --- tables
    def fixed(self, op: Op) -> Tensor:
        return self._full(op)

    def table(self, op: Op, times: Sequence[str | None]) -> Value:
        at = [i for i, time in enumerate(times) if time is not None]
        if len(at) != 1 or times[at[0]] != NEW:
            raise Refused(op, "needs a table by two positions outside attention")
        key = (op, at[0])
        if key not in self._rows:
            self._rows[key] = self._gathered(op, at[0])
        return self._rows[key]

    def _gathered(self, op: Op, axis: int) -> Value:
        """The rows of a table at the new tokens' positions: by the author's operators if possible, else gathered."""
        axes = tuple(Axis(1, NEW) if i == axis else Axis(s.at(0)) for i, s in enumerate(op.shape))
        if self._full.counts(op):
            tensor = self._positions.to(op.dtype) if op.dtype is not None else self._positions
            shape = [-1, *(self.lengths.new if i == axis else 1 for i in range(len(axes)))]
            return Value(tensor if len(axes) == 1 else tensor.reshape(shape), axes)
        source = op
        while source.name in ("clone", "detach", "alias", "contiguous") or (
            source.name == "slice" and _from_first(source)
        ):
            source = source.inputs[0]
        if axis == 0 and not source.timed and not source.depends and len(source.shape) == 2:
            return Value(F.embedding(self._positions, self._plainly(source)), axes)
        if self._by_rows(op):
            try:
                made: Value = self.apply(op, self._row_of)
                return made
            except Refused:
                pass
        table = self._full(op)
        if self._full.uniform(op):  # e.g. zeros that are written into
            sizes = [self.lengths.new if a.time else a.size for a in axes]
            return Value(table.flatten()[:1].expand(sizes), axes, batched=False)
        pairs = table.is_complex()
        if pairs:
            table = torch.view_as_real(table.resolve_conj())
        rows = table.movedim(axis, 0)
        flat = rows.reshape(rows.shape[0], -1)
        tensor = F.embedding(self._positions, flat)
        tensor = tensor.reshape(*tensor.shape[:2], *rows.shape[1:]) if rows.dim() != 2 else tensor
        return Value(tensor.movedim(1, 1 + axis) if axis else tensor, axes, complex=pairs)

    def _by_rows(self, op: Op) -> bool:
        """Whether its rows, of real numbers, follow from input rows: no input has two axes of the length."""
        timed = [i for i in op.inputs if i.timed]
        return (
            bool(timed)
            and op.name != "getitem"
            and op.dtype is not None
            and not op.dtype.is_complex
            and all(sum(s.moves for s in i.shape) == 1 for i in timed)
        )

    def _row_of(self, op: Op) -> object:
        if not op.timed:
            return self.value_of(op)
        at = next(i for i, size in enumerate(op.shape) if size.moves)
        if op.shape[at] != Size(1, 0):
            raise Refused(op, "needs a table of another length than the text's")
        return self.table(op, [NEW if i == at else None for i in range(len(op.shape))])

    # --- attention
    def product(self, op: Op, a: Value, b: Value, letters: Contraction) -> Value:
        if op in self.swapped:
            a, b, letters = b, a, (letters[1], letters[0], letters[2])
        self._operands[op] = (a, b, letters)
        return self._templates[op]

    def weighted(self, op: Op, weights: Value | Op, values: Value, letters: Contraction) -> Value:
        planned = self._plan[op]
        found = planned.attention
        if isinstance(weights, Op):
            weights = self._templates[weights]
        queries, keys, counts = [], [], []
        for product, layout in zip(found.products, found.layouts, strict=True):
            a, b, parts = self._operands[product]
            heads = "".join(parts[2][i] for i in layout.heads)
            summed = "".join(x for x in parts[0] if x not in parts[2])
            query, _ = self._headed(a, parts[0], heads, summed)
            if planned.latent is not None:  # no key is computed
                queries.append(_flat(query, layout_sizes(layout), layout_sizes(layout))[0])
                continue
            key, kept = self._headed(b, parts[1], heads, summed)
            queries.append(_flat(query, layout_sizes(layout), layout_sizes(layout))[0])
            key, count = _flat(key, layout_sizes(layout), kept)
            keys.append(key)
            counts.append(count)
        outer = [
            letter for i, letter in enumerate(letters[0]) if weights.axes[i].time is None and i != weights.batch_axis
        ]
        sizes = [weights.axes[letters[0].index(letter)].size for letter in outer]
        free = "".join(x for i, x in enumerate(letters[1]) if x not in letters[0] and i != values.batch_axis)
        if planned.latent is not None:
            output = attend_latent(
                planned.latent,
                [self.known[source] for source in planned.latent.sources],
                self._one_query(planned, queries),
                lambda kind: self._constant(kind, planned.number),
                self._form(op, planned),
            )
            return self._spread(output, weights, values, letters, outer, sizes, free)
        value, kept = self._headed(values, letters[1], "".join(outer), free)
        value, count = _flat(value, sizes, kept)
        if not queries:
            queries = [value.new_zeros(value.shape[0], math.prod(sizes), value.shape[2], _NOTHING)]
            keys, counts = [value.new_zeros(*value.shape[:3], _NOTHING)], [count]
        most = max(*counts, count)
        keys = [repeated(k, most) for k in keys]
        value = repeated(value, most)
        output = self._attend(op, planned, queries, keys, value)
        return self._spread(output, weights, values, letters, outer, sizes, free)

    def _attend(self, op: Op, planned: Planned, queries: list[Tensor], keys: list[Tensor], value: Tensor) -> Tensor:
        found = planned.attention
        common = {"mask": None, "dropout": 0.0, "is_causal": True, "where": op.where}
        if not planned.known:
            others = dict(self.known)
            sizes = [q.shape[-1] for q in queries]

            def weights(scores: list[Tensor], total: object) -> Tensor:
                run = Weights(self.program, found, Lengths(scores[0].shape[2], total), self._weight, self._full)
                return run.run(scores, others)

            return attend(
                AttentionCall(
                    query=torch.cat(queries, -1) if len(queries) > 1 else queries[0],
                    key=torch.cat(keys, -1) if len(keys) > 1 else keys[0],
                    value=value,
                    scale=1.0,
                    weights=weights,
                    parts=tuple(int(s) for s in sizes),
                    **common,  # type: ignore[arg-type]
                )
            )
        query, key = self._one_query(planned, queries), torch.cat(keys, -1) if len(keys) > 1 else keys[0]
        width = value.shape[-1]
        if query.shape[-1] != width and not planned.bias:
            # GroupQueryAttention requires keys and values of one size.
            wide = max(query.shape[-1], width)
            query, key, value = (F.pad(t, (0, wide - t.shape[-1])) for t in (query, key, value))
        output = attend(AttentionCall(query=query, key=key, value=value, **self._form(op, planned)))
        return output[..., :width]

    def _one_query(self, planned: Planned, queries: list[Tensor]) -> Tensor:
        """The queries of all products, (B, H, T, D)."""
        if planned.scale is None:
            scales = self._constant("scale", planned.number)
            queries = [q * scale[:, None, None] for q, scale in zip(queries, scales.unbind(0), strict=True)]
        return torch.cat(queries, -1) if len(queries) > 1 else queries[0]

    def _form(self, op: Op, planned: Planned) -> dict[str, Any]:
        """The arguments of an AttentionCall whose form is known, besides queries, keys and values."""
        return {
            "mask": None,
            "dropout": 0.0,
            "is_causal": True,
            "where": op.where,
            "scale": 1.0 if planned.scale is None else planned.scale,
            "window": planned.window,
            "softcap": planned.softcap,
            "sinks": self._constant("sinks", planned.number) if planned.sinks else None,
            "bias": self._constant("bias", planned.number) if planned.bias else None,
        }

    def _headed(self, x: Value, letters: str, heads: str, last: str) -> tuple[Tensor, list[int]]:
        """The tensor as (B, heads..., T, D), with size 1 for a missing head axis, and the size of each head axis."""
        kept = [1] * len(heads)
        for i, letter in enumerate(letters):
            if letter in heads:
                axis = x.axes[i]
                if axis.repeat > 1 and axis.repeat < axis.size and axis.size // axis.repeat * axis.repeat != axis.size:
                    x = x.real()
        own = [i for i, letter in enumerate(letters) if letter in heads and i != x.batch_axis]
        time = next(i for i, axis in enumerate(x.axes) if axis.time == NEW)
        tail = [i for letter in last for i in [letters.index(letter)] if i != x.batch_axis]
        rest = [i for i in range(len(x.axes)) if i not in (*own, time, *tail) and i != x.batch_axis]
        for i in rest:  # axes of size 1 without a counterpart
            assert x.axes[i].size == 1, (letters, x.axes)
        own.sort(key=lambda i: heads.index(letters[i]))
        tensor = x.tensor
        places = [x.dim(i) for i in (*rest, *own, time, *tail)]
        if places != sorted(places):
            tensor = tensor.permute([0, *places])
        for _ in rest:
            tensor = tensor.squeeze(1)
        for i in own:
            axis = x.axes[i]
            kept[heads.index(letters[i])] = axis.size // axis.repeat
        missing = [k for k, letter in enumerate(heads) if letter not in [letters[i] for i in own]]
        for k in missing:
            tensor = tensor.unsqueeze(1 + k)
        if len(tail) != 1:
            tensor = tensor.reshape(*tensor.shape[: 2 + len(heads)], math.prod(x.axes[i].size for i in tail))
        return tensor, kept

    def _spread(
        self,
        output: Tensor,  # (B, H, T, D)
        weights: Value,
        values: Value,
        letters: Contraction,
        heads: Sequence[str],
        sizes: Sequence[int],
        free: str,
    ) -> Value:
        """The output of attention with the axes of the author's sum."""
        widths = [values.axes[letters[1].index(x)].size for x in free]
        tensor = output
        if len(sizes) != 1 or len(widths) != 1:
            tensor = tensor.reshape(tensor.shape[0], *sizes, self.lengths.new, *widths)
        query = next(letters[0][i] for i in weights.time_axes(NEW))
        names = [*heads, query, *free]
        for letter in [x for x in names if x not in letters[2]]:
            tensor = tensor.sum(1 + names.index(letter))
            names.remove(letter)
        order = [x for x in letters[2] if x in names]
        places = [1 + names.index(x) for x in order]
        if places != sorted(places):
            tensor = tensor.permute([0, *places])
        known = dict(zip(heads, sizes, strict=True)) | dict(zip(free, widths, strict=True))
        axes, batch = [], None
        for i, letter in enumerate(letters[2]):
            if letter in names:
                axes.append(Axis(1, NEW) if letter == query else Axis(known[letter]))
            else:
                axes.append(Axis(1))
                if batch is None:
                    batch = i
                else:
                    tensor = tensor.unsqueeze(i)
        return Value(tensor, tuple(axes), batch_axis=batch)


def layout_sizes(layout: Layout) -> list[int]:
    """The size of each head axis."""
    return [layout.axes[i].size for i in layout.heads]


def _flat(tensor: Tensor, sizes: Sequence[int], kept: Sequence[int]) -> tuple[Tensor, int]:
    """(B, heads..., T, D) -> (B, K, T, D) and K; each of the K heads serves consecutive query heads."""
    grouped = True
    short = False
    for size, own in zip(sizes, kept, strict=True):
        if short and own != 1:
            grouped = False
        short = short or own != size
    if not grouped:
        tensor = tensor.expand(tensor.shape[0], *sizes, *tensor.shape[-2:])
        kept = sizes
    count = math.prod(kept)
    if len(sizes) != 1:
        tensor = tensor.reshape(tensor.shape[0], count, *tensor.shape[-2:])
    return tensor, count


def _from_first(op: Op) -> bool:
    """Whether a slice reads the first rows along axis 0, or everything along another axis."""
    defaults: tuple[Any, ...] = (0, None, None, 1)
    dim, start, _, step = (*op.args[1:], *defaults[len(op.args) - 1 :])
    return (
        start in (None, 0)
        and step == 1
        and (dim == 0 or (not op.shape[dim].moves and op.shape[dim] == op.inputs[0].shape[dim]))
    )

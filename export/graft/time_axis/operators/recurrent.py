"""Recurrences: torch's own layers, and sums along the text. The memory of earlier tokens is a state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ...attention import remember
from ...probe.causes import Kind
from ...recurrences import Gated, GatedCall, LoopCall, ShiftCall, SumCall, Tensors
from ...states import RecurrenceCall, StateCall
from ..program.distribution import Recurrence
from ..program.loops import is_zero
from ..program.program import Op
from ..values import KEY, NEW, Axis, Value
from .base import Refused, over_time
from .linear import Factors, LinearRule, linear_rule, product
from .products import Products


class Recurrent(Products):
    """Operators whose rows depend on all earlier rows by a state of one size."""

    ids: Tensor  # (B, T) of the new tokens
    begins: Tensor | None = None  # (B, 1) whether a row's text begins in this run; None: it does
    kept = 0  # how many states were kept so far

    def apply(self, op: Op, known: Callable[[Op], Any]) -> Any:
        """Applies the rule of an operator."""
        raise NotImplementedError

    def value_of(self, op: Op) -> Any:
        """The operand that the rules get for an operator."""
        raise NotImplementedError

    def keep(self, call: StateCall) -> Tensor:
        """The outputs of a call that keeps a state."""
        self.kept += 1
        return remember(call)

    def _cumsum(self, op: Op, x: Value, dim: int, **kwargs: Any) -> Value:
        at = dim % max(len(x.axes), 1)
        if not op.depends or not x.axes or x.axes[at].time != NEW or x.scores:
            found: Value = self._along(op, x, dim, **kwargs)
            return found
        x = x.real()
        if x.lifted or x.local or not x.axes[at].plain_time:
            raise over_time(op, op.name)
        rows = x.tensor.movedim(x.dim(at), 1).to(op.dtype)
        sums = self.keep(SumCall(rows[..., None].flatten(2).to(torch.float32)))
        tensor = sums.to(rows.dtype).reshape(rows.shape).movedim(1, x.dim(at))
        return x.with_(tensor=tensor)

    def _gru(
        self,
        op: Op,
        x: Value,
        hidden: Any,
        weights: Sequence[Value],
        biased: bool,
        layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> list[Value | None]:
        """(rows, h of each layer), and c of an LSTM: as if every token were the last."""
        kind = cast(Gated, op.name.upper())
        parts, sources = (hidden, op.args[1]) if kind == "LSTM" else ([hidden], [op.args[1]])
        if bidirectional:
            raise Refused(op, f"runs a {kind} in both directions, so that a token sees later ones", Kind.LOOK_AHEAD)
        if train and dropout:
            raise Refused(op, "drops out numbers outside training", Kind.CHANCE)
        if len(weights) != layers * (4 if biased else 2):
            raise Refused(op, "projects the state of an LSTM (proj_size): leave it out, and use a Linear behind it")
        time, batch = (1, 0) if batch_first else (0, 1)
        x = x.real()
        if x.time_axes(NEW) != [time] or x.axes[batch].size != 1 or not x.axes[time].plain_time or x.lifted:
            axes = "(B, T, F) with batch_first=True, (T, B, F) without"
            raise Refused(op, f"runs a {kind} along another axis than the text's, or over several rows of it: {axes}")
        if any(user.name == "getitem" and user.args[1] == 2 for user in op.users):
            raise Refused(op, "reads the last cell state of an LSTM: read its output instead")
        rows = x.tensor.movedim(x.dim(time), 1)[..., None].flatten(2)
        ends = []
        for layer, own in enumerate(_divided([weight.tensor for weight in weights], layers)):
            beginning = [self._beginning(op, part)[layer] for part in parts]
            known = () if all(map(is_zero, sources)) else tuple(beginning)
            rows = self.keep(GatedCall(kind, rows, own, known, self.begins))
            ends.append(rows)
        outer = [Axis(1), Axis(1)]
        outer[time] = Axis(1, NEW)
        size = Axis(rows.shape[2])
        output = Value(rows, (*outer, size), batch_axis=batch)
        last = Value(torch.stack(ends, 2), (Axis(layers), Axis(1), size), batch_axis=1, lifted=True)
        return [output, last, None]

    _lstm = _rnn_tanh = _rnn_relu = _gru

    def _beginning(self, op: Op, part: Any) -> Tensor:
        """(layers, 1, H)."""
        if not isinstance(part, Value) or part.batched:
            raise Refused(op, "begins with a state that is made of the text's tokens", Kind.RECURRENCE)
        return part.real().tensor

    # --- loops over tokens: a lifted value holds the rows of all tokens
    def _token_row(self, op: Op, x: Value, dim: int, kept: bool) -> Value:
        x = x.real()
        if x.axes[dim].time != NEW or not x.axes[dim].plain_time or x.time_axes(KEY) or x.lifted or x.products:
            raise Refused(op, "reads one position out of all")
        if not x.batched:
            x = x.with_(tensor=x.tensor[None], batched=True)
        row = self._lift(op, x, dim)
        return self._unsqueeze(op, row, dim) if kept else row

    def _text_rows(self, op: Op, x: Value, dim: int, kept: bool) -> Value:
        if kept:
            x = self._select(op, x.real(), dim, 0)
        x = self._every_token(x.real())
        batch = None if x.batch_axis is None else x.batch_axis + int(dim <= x.batch_axis)
        found = x.with_(axes=(*x.axes[:dim], Axis(1, NEW), *x.axes[dim:]), batch_axis=batch, lifted=False)
        return found.with_(tensor=x.tensor.movedim(1, found.dim(dim)))

    def _token_before(self, op: Op, x: Value) -> Value:
        x = self._every_token(x.real())
        rows = self.keep(ShiftCall(x.tensor[..., None].flatten(2).to(torch.float32)))
        return x.with_(tensor=rows.to(x.tensor.dtype).reshape(x.tensor.shape))

    def _every_token(self, x: Value) -> Value:
        """The value as one that is computed for each token."""
        if x.lifted:
            return x
        tensor = x.tensor if x.batched else x.tensor[None]
        sizes = tensor.shape[1:]
        return x.with_(
            tensor=tensor[:, None].expand(self.ids.shape[0], self.lengths.new, *sizes), batched=True, lifted=True
        )

    def _recurrence(self, op: Op, given: Sequence[Any]) -> list[Value]:
        loop: Recurrence = op.target
        known = dict(zip(op.inputs, given, strict=True))
        values = {i: v.real() for i, v in known.items() if isinstance(v, Value)}
        if len(values) < len(known) or any(
            v.products or v.time_axes(NEW) or v.time_axes(KEY) for v in [*values.values()][1:]
        ):
            raise Refused(op, "is a loop over tokens that reads values of the whole text", Kind.RECURRENCE)
        batch, new = self.ids.shape
        rule = linear_rule(loop)
        if rule is not None:
            return [self._linear_attention(loop, rule)]
        rows = {i: v for i, v in values.items() if v.lifted} or {op.inputs[0]: self._every_token(values[op.inputs[0]])}
        fixed = {i: v for i, v in values.items() if not v.lifted and i is not op.inputs[0]}
        layouts = [_layout(before) for before, _ in loop.states]
        outputs: list[Value] = []

        def body(parts: Tensors, of_token: Tensors, constant: Tensors) -> tuple[Tensors, Tensor]:
            inside = {i: v.with_(tensor=t, lifted=False) for (i, v), t in zip(rows.items(), of_token, strict=True)}
            inside |= {i: v.with_(tensor=t) for (i, v), t in zip(fixed.items(), constant, strict=True)}
            inside |= {b: v.with_(tensor=t) for (b, _), v, t in zip(loop.states, layouts, parts, strict=True)}
            for part in loop.body:
                inside[part] = self.apply(part, inside.__getitem__)
            layouts[:] = [_like(inside[after], before, batch) for before, after in loop.states]
            outputs[:] = [_like(inside[part], part, batch) for part in loop.outputs]
            flat = [value.tensor.reshape(batch, -1).to(torch.float32) for value in outputs]
            return [value.tensor for value in layouts], torch.cat(flat, 1) if len(flat) > 1 else flat[0]

        wide = tuple(v.tensor.expand(batch, *v.tensor.shape[1:]) for v in rows.values())
        constant = tuple(v.tensor for v in fixed.values())
        for _ in range(2):  # the first run shows where the batch axis of each state is
            parts = tuple(value.tensor.new_zeros(batch, *value.tensor.shape[1:]) for value in layouts)
            body(parts, [row[:, 0] for row in wide], constant)
        found = self.keep(LoopCall(body, parts, wide, constant))
        sizes = [math.prod(value.tensor.shape[1:]) for value in outputs]
        pairs = zip(outputs, found.split(sizes, 2), strict=True)
        return [
            v.with_(tensor=t.to(v.tensor.dtype).reshape(batch, new, *v.tensor.shape[1:]), lifted=True) for v, t in pairs
        ]

    def _linear_attention(self, loop: Recurrence, rule: LinearRule) -> Value:
        state = [size.at(0) for size in loop.states[0][0].shape]
        sizes = {label: size for label, size in zip(rule.state, state, strict=True) if label is not None}
        h, d, v = rule.axes
        batch, new = self.ids.shape

        def rows(factors: Factors, *last: int) -> Tensor:
            labels = [*([] if h is None else [h]), *last]
            shape = [batch, new, *([1] if h is None else []), *(sizes[label] for label in labels)]
            found = product(factors, labels, sizes, self.value_of)
            return (found.unsqueeze(2) if h is None and found.dim() else found).expand(shape)

        wide = d in {label for _, own in rule.decay for label in own}  # a decay for each channel of the keys
        call = RecurrenceCall(
            rows(rule.query, d),
            rows(rule.key, d),
            rows(rule.value, v),
            rows(rule.decay, *([d] if wide else [])).log(),
            None if rule.beta is None else rows(rule.beta),
            1.0,
        )
        output = self.keep(call)
        tensor = output if h is not None else output.squeeze(2)
        places = [label for label in rule.output if label is not None]
        if places == [v, h]:
            tensor = tensor.transpose(2, 3)
        axes = tuple(Axis(1 if label is None else sizes[label]) for label in rule.output)
        found = Value(tensor, axes, lifted=True, batch_axis=None)
        for i, label in enumerate(rule.output):
            if label is None and found.batch_axis is None:
                found = found.with_(batch_axis=i)
            elif label is None:
                found = found.with_(tensor=found.tensor.unsqueeze(found.dim(i)))
        return found


def _layout(op: Op) -> Value:
    """A value of one token with zeros, its first axis of size 1 as the batch axis."""
    sizes = [size.at(0) for size in op.shape]
    batch = 0 if sizes[:1] == [1] else None
    axes = tuple(Axis(size) for size in sizes)
    return Value(torch.zeros(1, *sizes[int(batch is not None) :], dtype=op.dtype), axes, batch_axis=batch)


def _like(value: Value, op: Op, batch: Any) -> Value:
    """A value of the body as rows (B, ...), whatever it depends on."""
    value = value.real() if value.batched else value.real().explicit()
    tensor = value.tensor if value.batched else value.tensor[None].expand(batch, *value.tensor.shape)
    return value.with_(tensor=tensor.to(op.dtype), batched=True)


def _divided(weights: Sequence[Tensor], count: int) -> list[tuple[Tensor, ...]]:
    size = len(weights) // count
    return [tuple(weights[i * size : (i + 1) * size]) for i in range(count)]

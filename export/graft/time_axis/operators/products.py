"""Products: rows times weights, q kᵀ, and the sum of weighted values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...probe.causes import Kind
from ..program.program import Op, Size
from ..values import KEY, NEW, Axis, Value
from .along import Along
from .base import Contraction, Refused, Swapped, over_time

PRODUCTS = {"linear", "matmul", "bmm", "mm", "mv", "dot", "einsum"}


class Products(Along):
    """Treats every product as an einsum of two operands."""

    def _linear(self, op: Op, x: Value | Op, weight: Value | Op, bias: Value | None = None) -> Value:
        if isinstance(x, Value) and isinstance(weight, Value) and not weight.batched:
            x = x.real()
            if x.axes[-1].time is not None:
                raise Refused(op, "multiplies the positions by a fixed number of weights", Kind.FIXED)
            if x.batch_axis == len(x.axes) - 1:
                x = x.explicit()
            axes = (*x.axes[:-1], Axis(weight.axes[0].size))
            return x.with_(
                tensor=F.linear(x.tensor, weight.tensor, bias.tensor if bias is not None else None), axes=axes
            )
        rank = len(op.args[0].shape)
        names = "abcdefghij"[: rank - 1]
        value = self.contract(op, x, weight, (names + "z", "yz", names + "y"))
        assert bias is None
        return value

    def _convolution(self, op: Op, x: Value, weight: Value, bias: Value | None = None, *args: Any) -> Value:
        """A convolution with a kernel of size 1 is a product of channels and weights."""
        shape = op.args[1].shape
        settings = [a for a in (*args[:1], *args[2:3]) if a not in (1, [1], [1, 1], (1,), (1, 1))]
        padded = len(args) > 1 and args[1] not in (0, [0], [0, 0], (0,), (0, 0), "valid")
        groups = args[3] if len(args) > 3 else 1
        if self.shifts and x.time_axes(NEW) == [len(x.axes) - 1] and len(shape) == 3 and x.batch_axis in (None, 0):
            rows = x.real().tensor
            flat = rows.flatten(0, -3)  # heads that the author merged with the batch
            made = op.target(flat, weight.tensor, None if bias is None else bias.tensor, *args)
            return self.shifted(op, x, len(x.axes) - 1, made.reshape(*rows.shape[:-2], *made.shape[-2:]))
        if (
            any(size.at(0) != 1 for size in shape[2:])
            or settings
            or padded
            or groups != 1
            or len(op.shape) != len(shape)
        ):
            raise Refused(op, "convolves over positions")
        tensor = weight.tensor.reshape(weight.tensor.shape[:2])
        matrix = Value(tensor, weight.axes[:2], batched=False)
        names = "abcdefg"[: len(op.shape)]
        found = self.contract(op, x, matrix, (names, "z" + names[1], names[0] + "z" + names[2:]))
        if bias is None:
            return found
        wide = Value(
            bias.tensor.reshape(-1, *[1] * (len(shape) - 2)), (*bias.axes, *[Axis(1)] * (len(shape) - 2)), False
        )
        added = Op(torch.ops.aten.add.Tensor, op.args, {}, op.shapes, op.dtype, op.where)
        return self._pointwise(added, found, wide)

    _conv1d = _conv2d = _convolution

    def _matmul(self, op: Op, a: Value | Op, b: Value | Op) -> Value:
        first, second = op.args[0].shape, op.args[1].shape
        return self.contract(op, a, b, matmul_letters(first, second, op.shape))

    _bmm = _mm = _mv = _dot = _matmul

    def _outer(self, op: Op, a: Any, b: Any) -> Value:
        return self.contract(op, a, b, ("a", "b", "ab"))

    def _einsum(self, op: Op, equation: str, operands: Sequence[Any], **_: Any) -> Value:
        letters = einsum_letters(equation, [len(o.shape) for o in op.args[1]])
        if len(operands) == 1:
            return self._einsum_one(op, self._value(op, operands[0]), letters)
        (value, *others), (known, *rest), out = operands, letters[:-1], letters[-1]
        for i, other in enumerate(others):
            needed = "".join([out, *rest[i + 1 :]])
            result = out if i == len(others) - 1 else "".join(dict.fromkeys(x for x in known + rest[i] if x in needed))
            value, known = self.contract(op, value, other, (known, rest[i], result)), result
        assert isinstance(value, Value)
        return value

    def _einsum_one(self, op: Op, x: Value, letters: list[str]) -> Value:
        source, out = letters[0], letters[-1]
        if len(set(source)) != len(source):
            raise Refused(op, "reads a diagonal")
        gone = [i for i, letter in enumerate(source) if letter not in out]
        if any(x.axes[i].time for i in gone):
            raise over_time(op, "einsum")
        x = self._permuted(x.real().explicit(), [*(source.index(letter) for letter in out), *gone])
        for _ in gone:
            x = x.with_(tensor=x.tensor.sum(-1), axes=x.axes[:-1])
        return x

    def contract(self, op: Op, a: Value | Op, b: Value | Op, letters: Contraction) -> Value:
        """An einsum of two operands, of which at least one depends on the tokens."""
        la, lb, lo = letters
        if any(isinstance(x, Value) and x.complex for x in (a, b)):
            raise Refused(op, "multiplies matrices of complex numbers: write it with real ones, of view_as_real")
        if isinstance(a, Op) and isinstance(b, Op):
            raise Refused(op, "multiplies two tables")
        if isinstance(a, Op) or isinstance(b, Op):
            return self._with_table(op, a, b, letters)
        times = [
            {letter: v.axes[i].time for i, letter in enumerate(ls) if v.axes[i].time} for v, ls in ((a, la), (b, lb))
        ]
        summed = {letter for letter in (*times[0], *times[1]) if letter not in lo}
        for letter in summed:
            kinds = (times[0].get(letter), times[1].get(letter))
            if KEY in kinds and NEW in kinds:
                first = kinds[0] == KEY
                return self.weighted(op, a if first else b, b if first else a, (la, lb, lo) if first else (lb, la, lo))
            products = a.scores | b.scores
            if kinds == (NEW, NEW) and products and not (a.scores and b.scores):
                raise Swapped(op, products)
            raise Refused(op, "sums over all positions, including later ones", Kind.LOOK_AHEAD)
        own = [{letter for letter, time in t.items() if time == NEW} for t in times]
        if own[0] - own[1] and own[1] - own[0]:
            if a.scores or b.scores:
                raise Refused(op, "multiplies scores with tokens")
            return self.product(op, a, b, letters)
        return self.multiplied(op, a, b, letters)

    def _with_table(self, op: Op, a: Value | Op, b: Value | Op, letters: Contraction) -> Value:
        first = isinstance(a, Op)
        table, value = (a, b) if first else (b, a)
        lt, lv, lo = letters if first else (letters[1], letters[0], letters[2])
        assert isinstance(table, Op)
        assert isinstance(value, Value)
        known = {letter: value.axes[i].time for i, letter in enumerate(lv)}
        times = [
            (known.get(letter) or KEY) if size.moves else None for letter, size in zip(lt, table.shape, strict=True)
        ]
        summed = [letter for letter, time in zip(lt, times, strict=True) if time and letter not in lo]
        if summed and known.get(summed[0]) == NEW and not value.scores:
            return self.weighted(op, table, value, (lt, lv, lo))
        laid = self.lay_exactly(op, table, times)
        pair = (laid, value) if first else (value, laid)
        return self.multiplied(op, *pair, letters)

    def multiplied(self, op: Op, a: Value, b: Value, letters: Contraction) -> Value:
        """An einsum that keeps positions separate."""
        la, lb, lo = letters
        a, b = a.real(), b.real()
        if not b.batched and lb[-2:] and len(lb) == 2 and la[-1] == lb[0] and lo == la[:-1] + lb[1] and not a.complex:
            value = a.explicit() if a.batch_axis == len(a.axes) - 1 else a
            return value.with_(tensor=value.tensor @ b.tensor, axes=(*value.axes[:-1], b.axes[1]), products=a.products)
        batched, lifted = a.batched or b.batched, a.lifted or b.lifted
        batch = _batch_letter(a, b, la, lb)
        parts, tensors = [], []
        for value, ls in ((a, la), (b, lb)):
            tensor, names = _lettered(value, ls, batch)
            parts.append(("Z" if value.batched else "") + ("Y" if value.lifted else "") + names)
            tensors.append(tensor)
        if op.dtype is not None and op.dtype.is_floating_point:
            tensors = [t if t.is_floating_point() else t.to(op.dtype) for t in tensors]
        present = set(parts[0] + parts[1])
        out = ("Z" if batched else "") + ("Y" if lifted else "") + "".join(x for x in lo if x in present)
        if present <= set(out):
            first, second = (_broadcast(tensor, names, out) for tensor, names in zip(tensors, parts, strict=True))
            result = first * second
        else:
            result = torch.einsum(f"{parts[0]},{parts[1]}->{out}", *tensors)
        axes, batch_axis = [], None
        for i, letter in enumerate(lo):
            if letter not in present:
                if letter == batch:
                    batch_axis = i
                else:
                    result = result.unsqueeze(int(batched) + int(lifted) + i - int(batch_axis is not None))
                axes.append(Axis(1))
                continue
            source = [v.axes[ls.index(letter)] for v, ls in ((a, la), (b, lb)) if letter in ls]
            axes.append(max(source, key=lambda axis: (axis.time is not None, axis.size)))
        return Value(result, tuple(axes), batched, batch_axis, lifted, False, a.products | b.products)


def _broadcast(tensor: Tensor, names: str, out: str) -> Tensor:
    """Adds an axis of size 1 for each letter of `out` that the tensor lacks."""
    order = [names.index(x) for x in out if x in names]
    if order != sorted(order):
        tensor = tensor.permute(order)
    for i, letter in enumerate(out):
        if letter not in names:
            tensor = tensor.unsqueeze(i)
    return tensor


def matmul_letters(a: Sequence[Size], b: Sequence[Size], out: Sequence[Size]) -> Contraction:
    """The letters of both operands of a matmul and of its result, by their shapes."""
    names = "abcdefghijkl"
    if len(a) == 1 or len(b) == 1:
        batch = names[: max(len(a), len(b)) - 2] if len(a) > 1 or len(b) > 1 else ""
        la = batch + "yz" if len(a) > 1 else "z"
        lb = batch + "zx" if len(b) > 1 else "z"
        return la, lb, "".join(x for x in la + lb if x != "z")
    rank = len(out)
    batch = names[: rank - 2]
    la, lb = batch[rank - len(a) :] + "yz", batch[rank - len(b) :] + "zx"
    # An axis of size 1 that broadcasts gets a separate letter, which the product drops.
    unique = iter("ABCDEFGHIJKLMNOPQR")

    def named(letters: str, shape: Sequence[Size]) -> str:
        done = []
        for letter, size in zip(letters, shape, strict=True):
            at = batch.find(letter)
            done.append(next(unique) if at >= 0 and size == Size(0, 1) and out[at] != Size(0, 1) else letter)
        return "".join(done)

    return named(la, a), named(lb, b), batch + "yx"


def einsum_letters(equation: str, ranks: Sequence[int]) -> list[str]:
    """The letters of each operand and of the result, with one for each axis of an ellipsis."""
    sides, _, out = equation.replace(" ", "").partition("->")
    parts = sides.split(",")
    dots = max(
        (rank - len(p.replace("...", "")) for p, rank in zip(parts, ranks, strict=True) if "..." in p), default=0
    )
    extra = "ABCDEFGH"[:dots]
    letters = []
    for part, rank in zip(parts, ranks, strict=True):
        own = rank - len(part.replace("...", ""))
        letters.append(part.replace("...", extra[dots - own :]))
    if "->" not in equation:
        flat = "".join(parts).replace(".", "")
        out = ("..." if dots else "") + "".join(sorted(c for c in set(flat) if flat.count(c) == 1))
    return [*letters, out.replace("...", extra)]


def _batch_letter(a: Value, b: Value, la: str, lb: str) -> str | None:
    """The letter of the author's batch axis, if the other operand has its batch, size 1 or no axis there."""
    for value, ls, other, lo in ((a, la, b, lb), (b, lb, a, la)):
        if value.batch_axis is None:
            continue
        letter = ls[value.batch_axis]
        if letter not in lo or other.batch_axis == lo.index(letter):
            return letter
        axis = other.axes[lo.index(letter)]
        if axis.size == 1 and axis.time is None:
            return letter
    return None


def _lettered(value: Value, letters: str, batch: str | None) -> tuple[Tensor, str]:
    """The tensor without its batch axis and its broadcast axes of size 1, and the letters of the other axes."""
    own = None if value.batch_axis is None else letters[value.batch_axis]
    if own is not None and own != batch:
        value = value.explicit()
    names, tensor, at = "", value.tensor, value.lead
    for i, letter in enumerate(letters):
        if i == value.batch_axis:
            continue
        if letter == batch or (letter.isupper() and value.axes[i].size == 1 and value.axes[i].time is None):
            tensor = tensor.squeeze(at)
            continue
        names += letter
        at += 1
    return tensor, names

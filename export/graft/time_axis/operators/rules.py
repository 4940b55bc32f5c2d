"""What each operator does to the time axis: rows of the new tokens in, rows of the new tokens out.

An operator passes where a row of its result needs that row of its operands alone. Two of them do not, and are the
attention: a product of rows with rows, q kᵀ, whose columns are all tokens; and the sum over those columns, of weights
times values. What a product and its sum have between them is found here and handed over; anything else that mixes
positions is refused by name and line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...probe.causes import Kind
from ..program.program import Op, map_args
from ..values import Axis, Value
from .along import REDUCED, SAME_SHAPE
from .base import Refused, Unknown
from .products import Products

# Operators that are pointwise though torch does not tag them so, or that change nothing.
_POINTWISE = {
    "_to_copy", "clone", "alias", "detach", "lift_fresh_copy", "contiguous", "to", "type_as", "masked_fill", "where",
    "zeros_like", "ones_like", "full_like", "empty_like", "fill", "copy", "dropout", "feature_dropout", "softplus",
    "lerp", "nan_to_num", "isclose", "clamp", "_cast_Float", "float_power", "square", "silu", "gelu",
    "relu", "relu6", "leaky_relu", "elu", "selu", "mish", "hardswish", "hardsigmoid", "hardtanh", "logit", "prelu",
    "special_expit", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "__and__", "__or__", "__xor__",
    "logical_and", "logical_or", "logical_not",
    "result_type",
}  # fmt: skip
NOISE = {"rand_like", "randn_like", "rand", "randn", "bernoulli", "normal", "randint_like", "multinomial",
         "normal_functional", "uniform", "exponential", "randint", "randperm"}  # fmt: skip
DROPOUT = {"dropout", "feature_dropout", "alpha_dropout", "native_dropout"}
# What may read a table beside a value; other operators read one thing, of which a table gives its rows.
_TAKES_TABLES = {"cat", "concat", "concatenate", "stack", "embedding", "index", "linear", "matmul", "bmm", "mm", "mv",
                 "dot", "outer", "einsum"}  # fmt: skip


class Rules(Products):
    """The rule of each operator, by torch's name of it: `_softmax` is that of softmax."""

    def apply(self, op: Op, known: Callable[[Op], Any]) -> Any:
        """The result of an operator; a table with a time axis stays an Op until something needs it."""
        args, kwargs = map_args((op.args, op.kwargs), known)
        name = op.name
        if name == "getitem":
            return args[0][args[1]]
        if name.strip("_") in NOISE:
            raise Refused(op, "draws random numbers outside training", Kind.CHANCE)
        if name in DROPOUT and args[2] and args[1]:
            raise Refused(op, "drops out numbers outside training", Kind.CHANCE)
        rule = getattr(self, f"_{name.strip('_')}", None)
        if rule is not None and args and isinstance(args[0], Op) and name not in _TAKES_TABLES:
            args = (self._value(op, args[0]), *args[1:])
        if rule is None:
            if name in _POINTWISE or (hasattr(op.target, "tags") and torch.Tag.pointwise in op.target.tags):
                rule = self._pointwise
            elif name in SAME_SHAPE | REDUCED:
                rule = self._along
                args = (self._value(op, args[0]), *args[1:])
            else:
                raise Unknown(op, f"computes {name}, of which it is not known whether it mixes positions")
        return rule(op, *args, **kwargs)

    def _view_as_complex(self, op: Op, x: Value) -> Value:
        return x.with_(axes=x.axes[:-1], complex=True)

    def _view_as_real(self, op: Op, x: Value) -> Value:
        return x.with_(axes=(*x.axes, Axis(2)), complex=False)

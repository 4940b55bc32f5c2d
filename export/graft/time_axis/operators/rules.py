"""The rule of each operator for the time axis: rows of the new tokens in, rows of the new tokens out.

An operator passes if a row of its result needs only that row of its operands. Two operators differ, and form
attention: the product q kᵀ of rows with rows, whose columns are all tokens, and the sum of weights times values over
those columns. The rules find both and hand over the operators between them. Any other operator that mixes positions
is an error with its name and line.
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
from .recurrent import Recurrent

# Pointwise operators without torch's tag, and operators that change nothing.
_POINTWISE = {
    "_to_copy", "clone", "alias", "detach", "lift_fresh_copy", "contiguous", "to", "type_as", "masked_fill", "where",
    "zeros_like", "ones_like", "full_like", "empty_like", "fill", "copy", "dropout", "feature_dropout", "softplus",
    "lerp", "nan_to_num", "isclose", "clamp", "_cast_Float", "float_power", "square", "silu", "gelu",
    "relu", "relu6", "leaky_relu", "elu", "selu", "mish", "hardswish", "hardsigmoid", "hardtanh", "logit", "prelu",
    "special_expit", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "__and__", "__or__", "__xor__",
    "logical_and", "logical_or", "logical_not", "log_sigmoid",
    "result_type",
}  # fmt: skip
NOISE = {"rand_like", "randn_like", "rand", "randn", "bernoulli", "normal", "randint_like", "multinomial",
         "normal_functional", "uniform", "exponential", "randint", "randperm"}  # fmt: skip
DROPOUT = {"dropout", "feature_dropout", "alpha_dropout", "native_dropout"}
# Operators that may read a table and a value. For other operators, a table as first operand becomes a value.
_TAKES_TABLES = {"cat", "concat", "concatenate", "stack", "embedding", "index", "linear", "matmul", "bmm", "mm", "mv",
                 "dot", "outer", "einsum"}  # fmt: skip


class Rules(Recurrent):
    """The rule of each operator, as a method with torch's name of it: `_softmax` for softmax."""

    def apply(self, op: Op, known: Callable[[Op], Any]) -> Any:
        """Applies the rule of an operator. A table with a time axis stays an Op until a rule needs its numbers."""
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

    def _conj(self, op: Op, x: Value) -> Value:
        return x.with_(tensor=x.tensor * torch.tensor([1.0, -1.0])) if x.complex else x

    def _resolve_conj(self, op: Op, x: Value) -> Value:
        return x

    def _view_as_real(self, op: Op, x: Value) -> Value:
        return x.with_(axes=(*x.axes, Axis(2)), complex=False)

"""One operator of a program, with sizes that depend on the length of the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...probe.causes import Cause, Kind, ObstacleError


@dataclass(frozen=True)
class Size:
    """a·T + b, for a sequence of T tokens."""

    a: int
    b: int

    def at(self, length: Any) -> Any:
        return self.a * length + self.b if self.a else self.b

    @property
    def moves(self) -> bool:
        """Whether it depends on the length."""
        return self.a != 0


@dataclass(frozen=True)
class LengthNumber:
    """A number that depends on the length in another way than as an integer a·T + b."""

    first: Any
    second: Any
    moves = True

    def at(self, length: Any) -> Any:
        raise ObstacleError(Cause(Kind.LENGTH, f"computes with a number made from the length ({self.first}, say)"))


@dataclass(eq=False)
class Op:
    """One operator. An argument is an Op for the result of another operator, a Size if it depends on the length."""

    target: Any  # an OpOverload, operator.getitem, or the kind of an input: "ids", "weight", "constant"
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: tuple[tuple[Size, ...] | None, ...]  # of each output
    dtype: torch.dtype | None
    where: str  # file:line in user code
    constant: Tensor | None = None
    at_length: Callable[[int], Tensor] | None = None  # computes a constant that differs by length
    depends: bool = False  # on the ids
    number: int = 0
    users: list[Op] = field(default_factory=list, repr=False)
    owner: str = ""  # class of the submodule
    helper: Op | None = None  # a table that a rule derives from it
    back: Op | None = None  # of `loops.token_before`: the value of the token before

    @property
    def name(self) -> str:
        """torch's name of the operator."""
        target = self.target
        return (
            target.overloadpacket.__name__
            if hasattr(target, "overloadpacket")
            else getattr(target, "__name__", str(target))
        )

    @property
    def shape(self) -> tuple[Size, ...]:
        shape = self.shapes[0]
        assert shape is not None
        return shape

    @property
    def inputs(self) -> list[Op]:
        found: list[Op] = []
        map_args((self.args, self.kwargs), lambda op: found.append(op))
        return found

    @property
    def timed(self) -> bool:
        """Whether an output has an axis of the length."""
        return any(size.moves for shape in self.shapes if shape is not None for size in shape)


def map_args(args: Any, of_op: Callable[[Op], Any], of_size: Callable[[Size], Any] = lambda size: size) -> Any:
    """The arguments of an operator with each Op and Size in them replaced."""
    if isinstance(args, Op):
        return of_op(args)
    if isinstance(args, Size):
        return of_size(args)
    if isinstance(args, list | tuple):
        kind = list if isinstance(args, list) else tuple  # a torch.Size cannot hold a Size
        return kind(map_args(a, of_op, of_size) for a in args)
    if isinstance(args, dict):
        return {k: map_args(v, of_op, of_size) for k, v in args.items()}
    return args

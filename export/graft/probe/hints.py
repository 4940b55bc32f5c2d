"""Watches one run for ids and lengths at which a module may compute otherwise than at random ones.

Two things tell them: the numbers that the module compares ids and positions with, and, where it reduces over the
tokens, those tokens of the vocabulary whose operands are the largest and the smallest. They only suggest what to
compare: a measured difference refuses a module, a hint never does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..attention import AttentionCall, Handler, torch_attention

_PRIMES = (251, 127, 61, 31, 13, 7, 5, 3, 2)  # tokens of a watched run: unlikely as another size of a tensor
_MOST_TOKENS = 24
_FEW = 16  # numbers of a tensor that ids are compared with

Run = Callable[[Tensor, Handler], object]  # runs the module on ids (1, T), its attention calls by the handler


@dataclass(frozen=True)
class Hints:
    """The suggestions of a watched run."""

    tokens: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    bytes_per_token: int = 1  # of the largest tensor that an operator makes, logits aside


def find_hints(run: Run, context_length: int, vocab_size: int, share: Callable[[float], float] | None) -> Hints:
    """Returns no hints for a module that fails on the watched texts.

    `share` gets the part of a run that computes what the module reduces over the tokens, and returns the part of the
    vocabulary to look through; without it only compared numbers are hints.
    """
    length = next((n for n in _PRIMES if n <= context_length), 1)
    watch = _Watch(length, vocab_size)
    with contextlib.suppress(Exception):  # a user's module may raise anything
        watch.over(run, torch.arange(length)[None] % vocab_size)
        extremes: list[int] = []
        if watch.last_reduction and share is not None:
            part = share(watch.last_reduction / watch.operators)
            with contextlib.suppress(Exception):
                extremes = _extremes(watch, run, int(vocab_size * min(part, 1.0)))
        tokens = dict.fromkeys([*extremes[: _MOST_TOKENS // 2], *watch.ids, *extremes])
        numbers = dict.fromkeys([*watch.ids, *watch.numbers])
        return Hints(tuple(tokens)[:_MOST_TOKENS], tuple(numbers), max(1, watch.largest // length))
    return Hints()


def _extremes(watch: _Watch, run: Run, count: int) -> list[int]:
    """The tokens, of the first `count`, with the largest and the smallest operand of each reduction."""
    best: dict[tuple[int, int], tuple[float, int]] = {}
    lowest: dict[tuple[int, int], float] = {}
    watch.until = watch.last_reduction
    for start in range(0, count, watch.length):
        ids = torch.arange(start, start + watch.length) % watch.vocab_size
        watch.over(run, ids[None])
        for number, (high, low) in enumerate(watch.operands):
            for sign, values in ((1, high), (-1, -low)):
                largest, key = float(values.max()), (number, sign)
                lowest[key] = min(lowest.get(key, largest), float(values.min()))
                if key not in best or largest > best[key][0]:
                    best[key] = (largest, int(ids[values.argmax()]))
    return [token for key, (largest, token) in best.items() if largest > lowest[key]]


class _EnoughError(Exception):
    """Ends a run whose rest is not needed."""


class _Watch(TorchDispatchMode):
    """Sees each operator of a run outside attention."""

    def __init__(self, length: int, vocab_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length, self.vocab_size = length, vocab_size
        self.ids: dict[int, None] = {}  # numbers that integers are compared with, and that may be ids
        self.numbers: dict[int, None] = {}  # other numbers
        self.largest = 0  # bytes of a tensor
        self.operators = 0  # of the last run
        self.last_reduction = 0  # the number of its operator
        self.until = 0  # the operator after which a run ends; 0: none
        self.operands: list[tuple[Tensor, Tensor]] = []  # of each reduction: the largest and smallest (T,) per token
        self._paused = False

    def over(self, run: Run, ids: Tensor) -> None:
        self.operators, self.operands = 0, []
        with contextlib.suppress(_EnoughError), self:
            run(ids, self._attention)

    def _attention(self, call: AttentionCall) -> Tensor:
        self._paused = True
        try:
            return torch_attention(call)
        finally:
            self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = args[0] if args and isinstance(args[0], Tensor) else None
        if given is not None and self.vocab_size in given.shape:
            self._note_entries(func.overloadpacket.__name__, given, args)
        if self._paused or func.is_view:
            return result
        self.operators += 1
        made = result if isinstance(result, Tensor) else None
        if made is not None and made.shape[-1:] != (self.vocab_size,):
            self.largest = max(self.largest, made.nbytes)
        name = func.overloadpacket.__name__
        if name == "isin" or (torch.Tag.pointwise in func.tags and name != "pow"):  # squares compare nothing
            self._note_numbers(args, given)
        elif given is not None and (axis := self._reduced(func, given, args, kwargs or {}, made)) is not None:
            operand = given.detach().movedim(axis, 0).reshape(self.length, -1).double()
            self.operands.append((operand.amax(1), operand.amin(1)))
            self.last_reduction = max(self.last_reduction, self.operators)
        if self.operators == self.until:
            raise _EnoughError
        return result

    def _note_entries(self, name: str, given: Tensor, args: Any) -> None:
        """Notes the token whose entry is read from a tensor with one for each, and those that a table sets apart."""
        if name == "select" and given.shape[args[1]] == self.vocab_size:
            self.ids.setdefault(int(args[2]) % self.vocab_size)
        elif name == "index" and given.dim() == 1:
            self.ids |= dict.fromkeys((int(given.double().argmax()), int(given.double().argmin())))

    def _note_numbers(self, args: Any, given: Tensor | None) -> None:
        whole = given is None or not given.is_floating_point()
        for value in args:
            if isinstance(value, Tensor) and value.numel() <= _FEW and not value.is_floating_point():
                found = value.flatten().tolist() if self.length not in value.shape else []
            else:
                found = [value] if isinstance(value, int | float) else []
            for number in found:
                if not isinstance(number, bool) and 0 <= number < 1 << 31:
                    (self.ids if whole and number < self.vocab_size else self.numbers).setdefault(int(number))

    def _reduced(self, func: Any, given: Tensor, args: Any, kwargs: Any, made: Tensor | None) -> int | None:
        """The axis of the tokens, if the operator computes over it."""
        axes = [axis for axis, size in enumerate(given.shape) if size and size % self.length == 0]
        if not axes or self.length == 1:
            return None
        for place, argument in enumerate(func._schema.arguments):
            if argument.name in ("dim", "dims"):
                over = args[place] if place < len(args) else kwargs.get(argument.name, argument.default_value)
                over = [] if over is None else over if isinstance(over, list | tuple) else [over]
                over = [axis % given.dim() for axis in over if isinstance(axis, int)] or axes
                return next((axis for axis in axes if axis in over), None)
        lost = made is not None and not any(size and size % self.length == 0 for size in made.shape)
        return axes[0] if lost else None

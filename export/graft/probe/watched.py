"""Watches a module's real runs, without a trace: random numbers, state kept on itself, autocast."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..attention import calling_line, replaced
from ..time_axis.operators.rules import DROPOUT, NOISE
from .causes import Cause, Kind

HALF = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def without_autocast() -> Iterator[list[torch.autocast]]:
    """While open, torch.autocast has no effect in this thread. Yields the entered contexts of half precision."""
    entered: list[torch.autocast] = []
    ours = threading.get_ident()  # another thread may train meanwhile
    own_enter: Callable[..., Any] = torch.autocast.__enter__
    own_exit: Callable[..., Any] = torch.autocast.__exit__

    def enter(self: torch.autocast) -> Any:
        if threading.get_ident() != ours:
            return own_enter(self)
        if self._enabled and self.fast_dtype in HALF:
            entered.append(self)
        return self

    def leave(self: torch.autocast, *error: Any) -> Any:
        return own_exit(self, *error) if threading.get_ident() != ours else None

    with replaced(torch.autocast, "__enter__", enter), replaced(torch.autocast, "__exit__", leave):
        yield entered


def draws(run: Callable[[], object]) -> list[Cause]:
    """Each line that draws random numbers through torch."""
    found: dict[str, str] = {}

    class DrawsWatch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__.strip("_")
            if name in NOISE | DROPOUT:
                where = calling_line()
                if found.get(where) != _DROPS:
                    found[where] = _DROPS if name in DROPOUT else "draws random numbers outside training"
            return func(*args, **(kwargs or {}))

    with DrawsWatch():  # type: ignore[no-untyped-call]
        run()
    if not found:
        return [Cause(Kind.CHANCE, "gives other logits each time it is run")]
    return [Cause(Kind.CHANCE, what, where) for where, what in found.items()]


def in_training(module: nn.Module) -> list[Cause]:
    """The cause of a module that eval() leaves in training mode."""
    awake = next((part for part in module.modules() if part.training), None)
    owners = (type(part) for part in module.modules() if type(part).train is not nn.Module.train)
    if awake is None:
        return []
    by = f"the train() of {next(owners, type(awake)).__name__}"
    return [Cause(Kind.TRAINING, f"stays in training mode after eval(), which {by} decides ({type(awake).__name__})")]


_DROPS = "drops out numbers outside training"


def kept(module: nn.Module, run: Callable[[], object]) -> list[Cause]:
    """Each attribute of a submodule that a run sets to tensors."""
    found: dict[str, Cause] = {}
    paths = {id(part): path for path, part in module.named_modules()}
    with _setting() as settings:
        run()
    for part, name, value, where in settings:
        if id(part) in paths and _holds_tensor(value):
            path = f"{paths[id(part)]}.{name}".lstrip(".")
            what = f"keeps {path} from one call to the next, and gives the same text other logits"
            found.setdefault(
                where, Cause(Kind.STATE, what, where, f"{type(part).__module__}.{type(part).__qualname__}")
            )
    return [*found.values()] or [Cause(Kind.STATE, "gives the same text other logits when it is run again")]


@contextlib.contextmanager
def _setting() -> Iterator[list[tuple[nn.Module, str, object, str]]]:
    """While open, lists each attribute that is set on a module: module, name, value, file:line."""
    settings: list[tuple[nn.Module, str, object, str]] = []
    original = nn.Module.__setattr__

    def watched(part: nn.Module, name: str, value: Any) -> None:
        settings.append((part, name, value, calling_line()))
        original(part, name, value)

    with replaced(nn.Module, "__setattr__", watched):
        yield settings


def _holds_tensor(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)

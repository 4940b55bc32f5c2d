"""Watches a module's real runs, without a trace: where it draws random numbers or keeps state on itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..attention import calling_line, replaced
from ..time_axis.operators.rules import DROPOUT, NOISE
from .causes import Cause, Kind


def draws(run: Callable[[], object]) -> list[Cause]:
    """Each line that draws random numbers through torch."""
    found: dict[str, str] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__.strip("_")
            if name in NOISE | DROPOUT:
                where = calling_line()
                if found.get(where) != _DROPS:
                    found[where] = _DROPS if name in DROPOUT else "draws random numbers outside training"
            return func(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]
        run()
    if not found:
        return [Cause(Kind.CHANCE, "gives other logits each time it is run")]
    return [Cause(Kind.CHANCE, what, where) for where, what in found.items()]


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

"""A decorator that lets one thread at a time run an object's methods."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar


class Locked(Protocol):
    """An object with decorated methods."""

    lock: threading.RLock | Any  # typing knows RLock as a function only


P = ParamSpec("P")
Self = TypeVar("Self", bound=Locked)
Result = TypeVar("Result")


def one_at_a_time(method: Callable[Concatenate[Self, P], Result]) -> Callable[Concatenate[Self, P], Result]:
    """Holds the object's `lock` during the method."""

    @functools.wraps(method)
    def locked(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        with self.lock:
            return method(self, *args, **kwargs)

    return locked

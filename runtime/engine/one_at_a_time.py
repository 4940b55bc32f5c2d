"""Methods of an object with a lock, of which one runs at a time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar


class Locked(Protocol):
    """Who has such methods."""

    lock: threading.RLock | Any  # typing knows RLock as a function only


P = ParamSpec("P")
Self = TypeVar("Self", bound=Locked)
Result = TypeVar("Result")


def one_at_a_time(method: Callable[Concatenate[Self, P], Result]) -> Callable[Concatenate[Self, P], Result]:
    """Lets a second thread wait while one is inside."""

    @functools.wraps(method)
    def locked(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        with self.lock:
            return method(self, *args, **kwargs)

    return locked

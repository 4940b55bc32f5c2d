"""A decorator that lets one thread at a time run an object's methods."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
Result = TypeVar("Result")


def one_at_a_time(method: Callable[Concatenate[Any, P], Result]) -> Callable[Concatenate[Any, P], Result]:
    """Holds the object's `lock` during the method."""

    @functools.wraps(method)
    def locked(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        with self.lock:
            return method(self, *args, **kwargs)

    return locked

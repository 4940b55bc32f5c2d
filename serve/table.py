"""A row of the table of routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from .api.schemas import Body
from .service import Service

Handler = Callable[[Service, Request, bytes], Awaitable[Response]]


@dataclass(frozen=True)
class Entry:
    """A route.

    Attributes:
        path: Without /v1.
        handler: The function that answers. Its docstring describes the route.
        body: The model of its JSON body, or None for GET.
        reply: The shape of its JSON reply; str for text.
        open: Whether it needs no key.
        streams: Whether `stream` makes the reply events.
    """

    path: str
    handler: Handler
    body: type[Body] | None = None
    reply: Any = dict[str, Any]
    open: bool = False
    streams: bool = False

    @property
    def method(self) -> str:
        """GET, or POST with a body."""
        return "GET" if self.body is None else "POST"

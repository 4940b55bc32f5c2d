"""The table of routes, and the application that answers them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from . import replies, schemas
from .errors import answer_error
from .guard import body_of, require_host, require_key, require_origin
from .routes import chat, completions, status
from .service import Service

Handler = Callable[[Service, Request, bytes], Awaitable[Response]]


@dataclass(frozen=True)
class Entry:
    """A route, which is there with and without /v1.

    Attributes:
        path: Without /v1.
        handler: What answers.
        body: The model of its JSON body, or None for GET.
        reply: The shape of its JSON reply.
        open: Whether it needs no key.
    """

    path: str
    handler: Handler
    body: type[schemas.Body] | None = None
    reply: Any = dict
    open: bool = False

    @property
    def method(self) -> str:
        """GET, or POST with a body."""
        return "GET" if self.body is None else "POST"


TABLE = (
    Entry("/chat/completions", chat.chat, schemas.ChatBody, replies.ChatReply),
    Entry("/completions", completions.completions, schemas.CompletionBody, replies.TextReply),
    Entry("/models", status.models),
    Entry("/models/{model:path}", status.model),
    Entry("/health", status.health, open=True),
    Entry("/metrics", status.metrics, reply=str),
    Entry("/props", status.props),
)


def application(service: Service) -> Starlette:
    """The application of a server."""
    settings = service.settings
    routes = [
        Route(prefix + entry.path, _endpoint(service, entry), methods=[entry.method], name=entry.path)
        for entry in TABLE
        for prefix in ("", "/v1")
    ]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.allow_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        max_age=86400,
    )
    return Starlette(
        routes=routes,
        middleware=[cors] if settings.allow_origins else [],
        exception_handlers={Exception: answer_error, 404: answer_error, 405: answer_error},
    )


def _endpoint(service: Service, entry: Entry) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            require_host(request, service.settings)
            require_origin(request, service.settings)
            if not entry.open:
                require_key(request, service.settings.keys)
            raw = await body_of(request, service.settings) if entry.body is not None else b""
            response = await entry.handler(service, request, raw)
        except Exception as error:
            response = await answer_error(request, error)
        service.metrics.requests.labels(entry.path, response.status_code).inc()
        return response

    return answer

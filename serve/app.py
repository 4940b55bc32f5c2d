"""The table of routes, and the application that answers them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pastkey.errors import InputError

from .api import replies, schemas
from .description import describe
from .errors import answer_error
from .guard import body_of, require_host, require_key, require_origin
from .routes import chat, completions, embeddings, page, responses, status, tokens
from .service import Service
from .table import Entry

TABLE = (
    Entry("/chat/completions", chat.chat, schemas.ChatBody, replies.ChatReply, streams=True),
    Entry("/completions", completions.completions, schemas.CompletionBody, replies.TextReply, streams=True),
    Entry("/responses", responses.responses, schemas.ResponsesBody, streams=True),
    Entry("/embeddings", embeddings.embeddings, schemas.EmbeddingBody),
    Entry("/tokenize", tokens.tokenize, schemas.TokenizeBody),
    Entry("/detokenize", tokens.detokenize, schemas.DetokenizeBody),
    Entry("/apply-template", tokens.apply_template, schemas.ConversationBody),
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

    async def description(service: Service, request: Request, raw: bytes) -> Response:
        """Describes the routes, as OpenAPI."""
        del service, request, raw
        return JSONResponse(describe(TABLE))

    routes.append(Route("/openapi.json", _endpoint(service, Entry("/openapi.json", description))))
    # An untrusted bundle has no page: its scripts would have this server's origin.
    routes += [
        Route(f"/{name}", _endpoint(service, Entry(f"/{name}", page.page, open=True)), methods=["GET"])
        for name in (() if settings.untrusted else page.FILES)
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
                require_key(request, service.settings)
            raw = await body_of(request, service.settings) if entry.body is not None else b""
            response = await entry.handler(service, request, raw)
        except Exception as error:
            if isinstance(error, InputError) and service.is_loaded:  # a client learns the name, not where the bundle is
                said = str(error).replace(str(service.model.bundle.path), service.settings.names[0])
                error = InputError(said, option=error.option)
            response = await answer_error(request, error)
        service.metrics.requests.labels(entry.path, response.status_code).inc()
        return response

    return answer

"""The state of the server: models, health, metrics, props."""

from __future__ import annotations

from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pastkey.errors import PastkeyError

from ..api.schemas import UNREAD
from ..errors import RequestError
from ..service import Service


def _model(service: Service, name: str) -> dict[str, Any]:
    manifest = service.model.manifest
    sizes = {"n_ctx_train": manifest.context_length, "n_vocab": manifest.vocab_size}
    names = [] if name in service.settings.adapters else list(service.settings.names)
    told = {"id": name, "object": "model", "created": service.started, "owned_by": "pastkey"}
    return {**told, "aliases": names, "meta": {**sizes, "precision": manifest.precision}}


async def models(service: Service, request: Request, raw: bytes) -> Response:
    """Lists the model, and its adapters."""
    names = (service.settings.names[0], *service.settings.adapters)
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in names]})


async def model(service: Service, request: Request, raw: bytes) -> Response:
    """Tells of the model by its name."""
    return JSONResponse(_model(service, service.require_model(request.path_params["model"])))


async def health(service: Service, request: Request, raw: bytes) -> Response:
    """Says whether the model is loaded: 200, or 503 before."""
    if service.model.closed:
        raise RequestError("the model is closed", status=503)
    found: dict[str, Any] = {"status": "ok"}
    if service.settings.untrusted:  # its parent ends a server whose step never ends
        found |= {"busy": service.model.scheduler.is_busy, "steps": service.model.activity.steps}
    return JSONResponse(found)


async def metrics(service: Service, request: Request, raw: bytes) -> Response:
    """Counters in Prometheus' text format."""
    return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)


async def props(service: Service, request: Request, raw: bytes) -> Response:
    """Tells the limits and the chat template."""
    found = service.model
    try:
        template = found.chat_format().source
    except PastkeyError:  # the bundle has none
        template = None
    return JSONResponse(
        {
            "model": service.settings.names[0],
            "context_length": found.manifest.context_length,
            "total_slots": service.settings.max_concurrency,
            "max_queue": service.settings.max_queue,
            "chat_template": template,
            "kernels": found.kernels,
            "defaults": service.defaults,
            "unread_fields": UNREAD,
        }
    )

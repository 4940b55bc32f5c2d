"""GET /: the page that runs the bundle in the browser, where `pastkey.web` is installed."""

from __future__ import annotations

import importlib
import mimetypes
from collections.abc import Mapping
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response

from pastkey.errors import PastkeyError

from ..errors import RequestError
from ..service import Service

_TYPES = {
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
    ".onnx": "application/octet-stream",
}
# Threads of WebAssembly need a page that is isolated from others.
_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def _site(service: Service) -> Mapping[str, Path | bytes]:
    """The files by their URL; empty without pastkey.web, or without its assets."""
    if service.site is None:
        try:
            service.site = importlib.import_module("pastkey.web").site(service.model.bundle)
        except (ModuleNotFoundError, PastkeyError):
            service.site = {}
    return service.site


async def page(service: Service, request: Request, raw: bytes) -> Response:
    """Gives a file of the page."""
    if request.method not in ("GET", "HEAD"):
        raise RequestError("Not Found", status=404)
    name = request.url.path.removeprefix("/") or "index.html"
    # A browser sends no key, and the files hold the weights.
    files = {} if service.settings.keys else await run_in_threadpool(_site, service)
    found = files.get(name)
    kind = _TYPES.get(Path(name).suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    if isinstance(found, Path):
        return FileResponse(found, media_type=kind, headers=_HEADERS)
    if found is not None:
        return Response(found, media_type=kind, headers=_HEADERS)
    if name == "index.html":
        return PlainTextResponse(
            f"pastkey serve: {service.settings.names[0]}. Clients of OpenAI's API take this address with /v1; "
            "/openapi.json describes the routes.\n"
        )
    raise RequestError("Not Found", status=404)

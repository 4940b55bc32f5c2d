"""GET /: a page that is a chat with this server."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from ..service import Service

_SCRIPT = "text/javascript"
FILES = {"": "text/html", "style.css": "text/css", "chat.js": _SCRIPT, "markdown.js": _SCRIPT}  # by their URL
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def page(service: Service, request: Request, raw: bytes) -> Response:
    """Gives a file of the page. It holds no secret: the page asks for the key."""
    del service, raw
    name = request.url.path.removeprefix("/")
    content = files("pastkey.serve").joinpath("page", name or "index.html").read_bytes()
    return Response(content, media_type=FILES[name], headers=_HEADERS)

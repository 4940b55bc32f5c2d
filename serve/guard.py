"""Who may ask, and how much: the Host and Origin headers, the key, the size and the time of a body."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection, Request

from .errors import RequestError
from .settings import LOOPBACK, ServerSettings


def require_host(connection: HTTPConnection, settings: ServerSettings) -> None:
    """Raises RequestError unless the Host header names this server.

    Otherwise a web page whose name resolves to this machine could ask (DNS rebinding).
    """
    server = connection.scope.get("server") or ("",)
    known = {*LOOPBACK, settings.host, str(server[0]), *settings.allow_hosts}
    try:
        host = urlsplit("//" + connection.headers.get("host", "")).hostname  # in lower case
    except ValueError:
        host = None
    if host not in {name.lower() for name in known}:
        raise RequestError("the Host header is not a name of this server: --allow-host NAME allows one", status=403)


def require_origin(connection: HTTPConnection, settings: ServerSettings) -> None:
    """Raises RequestError for a page of another site, unless its origin is allowed."""
    origin = connection.headers.get("origin")
    if origin is None or origin in settings.allow_origins or "*" in settings.allow_origins:
        return
    if origin.partition("://")[2] != connection.headers.get("host"):
        raise RequestError("web pages of other sites may not ask: --allow-origin ORIGIN allows one", status=403)


def salted(key: bytes, salt: str) -> str:
    """A hash of a key, which a process gets in its place that may not know the key."""
    return hashlib.sha256(salt.encode() + key).hexdigest()


def require_key(connection: HTTPConnection, settings: ServerSettings) -> None:
    """Raises RequestError unless the request has one of the keys, compared in constant time."""
    keys, salt = settings.keys, settings.key_salt
    if not keys:
        return
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else connection.headers.get("x-api-key", "")
    sent = [given.encode("latin-1"), given.encode()]  # UTF-8 as curl sends it, and Latin-1 as browsers do
    if salt:
        sent = [salted(one, salt).encode() for one in sent]
    wanted = [key.encode(errors="surrogateescape") for key in keys]  # an environment may have any bytes
    if not sum(hmac.compare_digest(one, key) for key in wanted for one in sent):  # each is compared
        raise RequestError(
            "the key is missing or wrong: send it as  Authorization: Bearer KEY", status=401, code="invalid_api_key"
        )


async def body_of(request: Request, settings: ServerSettings) -> bytes:
    """The body. Raises RequestError for one that is too large or comes too slowly."""
    too_large = RequestError(f"the body is larger than {settings.body_bytes:,} bytes", status=413)
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:20]) > settings.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.receive_seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > settings.body_bytes:
                    raise too_large
    except TimeoutError:
        raise RequestError(f"the body needed more than {settings.receive_seconds:g} seconds", status=408) from None
    return bytes(body)

"""Every exception as OpenAI's JSON: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from pastkey.errors import InputError, MissingExtraError, NumericsError, OptionError, QueueFullError, ResourceError
from pastkey.runtime.options import OPTIONS

_log = logging.getLogger("pastkey")
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (QueueFullError, 429),
    (ResourceError, 503),
    (NumericsError, 500),
    (MissingExtraError, 501),
    (InputError, 400),
    (OptionError, 400),
    (ClientDisconnect, 499),
)


class RequestError(Exception):
    """A request that is rejected.

    Attributes:
        status: The HTTP status.
        param: The field that is wrong, or None.
        code: OpenAI's word for the reason, or None.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def body_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the JSON object of an exception."""
    param = code = None
    message = str(error)
    if isinstance(error, RequestError):
        status, param, code = error.status, error.param, error.code
    elif isinstance(error, HTTPException):
        status, message = error.status_code, error.detail
    else:
        status = next((status for kind, status in _STATUS if isinstance(error, kind)), 0)
        code = "queue_full" if status == 429 else None
        param = error.option if isinstance(error, InputError) and error.option in OPTIONS else None
    if not status:
        _log.error("a request failed", exc_info=error)
        status, message = 500, "the server failed at this request; its log has the reason"
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """The response to an exception."""
    del request
    status, body = body_of(error)
    headers = {"Retry-After": "1"} if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE) else {}
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, HTTPException):
        headers |= dict(error.headers or {})
    return JSONResponse(body, status, headers)

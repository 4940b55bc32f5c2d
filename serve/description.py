"""The routes as an OpenAPI 3.1 description, from their pydantic models."""

from __future__ import annotations

import re
from functools import cache
from http import HTTPStatus
from typing import Any

from pydantic import TypeAdapter

import pastkey

from .api.replies import ErrorReply
from .table import Entry

_REF = "#/components/schemas/{model}"
_ERRORS = (400, 401, 403, 404, 408, 413, 429, 500, 501, 503)


@cache
def describe(table: tuple[Entry, ...]) -> dict[str, Any]:
    """The description of these routes, without /v1: `servers` names both."""
    schemas: dict[str, Any] = {}

    def schema(kind: Any, mode: Any) -> dict[str, Any]:
        found = TypeAdapter(kind).json_schema(ref_template=_REF, mode=mode)
        schemas.update(found.pop("$defs", {}))
        return found

    error = {"application/json": {"schema": schema(ErrorReply, "serialization")}}
    paths: dict[str, Any] = {}
    for entry in table:
        path = re.sub(r":\w+}", "}", entry.path)
        content: dict[str, Any] = {"application/json": {"schema": schema(entry.reply, "serialization")}}
        if entry.reply is str:
            content = {"text/plain": {"schema": {"type": "string"}}}
        if entry.streams:
            content["text/event-stream"] = {}  # OpenAPI 3.1 has no schema of events
        operation: dict[str, Any] = {
            "operationId": entry.handler.__name__,
            "summary": (entry.handler.__doc__ or "").strip(),
            "responses": {
                "200": {"description": "The answer.", "content": content},
                **{str(code): {"description": HTTPStatus(code).phrase, "content": error} for code in _ERRORS},
            },
        }
        if entry.open:
            operation["security"] = []
        names = re.findall(r"{(\w+)}", path)
        if names:
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
            ]
        if entry.body is not None:
            body = {"application/json": {"schema": schema(entry.body, "validation")}}
            operation["requestBody"] = {"required": True, "content": body}
        paths[path] = {entry.method.lower(): operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "pastkey serve", "version": pastkey.__version__},
        "servers": [{"url": "/v1"}, {"url": "/"}],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],
    }

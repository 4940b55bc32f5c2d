"""The fields of a request as the runtime's options."""

from __future__ import annotations

from typing import Any

from ..errors import RequestError
from ..service import Service
from .schemas import SAME, ChatBody, ResponseFormat, Sampling


def options_of(body: Sampling, service: Service, max_tokens: int = -1) -> dict[str, Any]:
    """The options of a generation. `max_tokens`: of a request that sets no limit; -1 is the context's end.

    Raises RequestError.
    """
    options: dict[str, Any] = {"max_new_tokens": max_tokens, **service.defaults}
    options |= {name: value for name in (*SAME, "json_schema") if (value := getattr(body, name)) is not None}
    if body.seed is not None and body.seed != -1:
        options["seed"] = body.seed
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if stop := [text for text in stop if text]:
        options["stop"] = stop
    if body.logit_bias:
        try:
            options["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
        except ValueError:
            raise RequestError("logit_bias maps token ids to numbers", param="logit_bias") from None
    if body.ignore_eos:
        options["eos_token_id"] = []
    options |= _format(body.response_format)
    limit = body.max_completion_tokens if isinstance(body, ChatBody) else None
    limit = body.max_tokens if limit is None else limit
    if limit is not None:
        options["max_new_tokens"] = limit
    if options["max_new_tokens"] == -1:
        options["max_new_tokens"] = service.model.manifest.context_length
    return options


def _format(asked: ResponseFormat | None) -> dict[str, Any]:
    """The constraint of a response_format."""
    if asked is None or asked.type == "text":
        return {}
    if asked.type == "json_object":
        return {"json_schema": asked.schema_ or {"type": "object"}}
    if asked.json_schema is None:
        raise RequestError("response_format has no json_schema", param="response_format.json_schema")
    return {"json_schema": asked.json_schema.schema_}

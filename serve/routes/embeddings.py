"""POST /v1/embeddings: texts -> vectors."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..api.schemas import EmbeddingBody, parsed
from ..service import Service, while_connected
from .completions import prompts_of


async def embeddings(service: Service, request: Request, raw: bytes) -> Response:
    """Embeds texts."""
    body = parsed(EmbeddingBody, raw)
    name = service.require_model(body.model, adapters=False)
    model = service.model

    def embed() -> tuple[Any, int]:
        ids: list[Any] = [model.prompt_ids(text) for text in prompts_of(body.input)]
        return model.embed(ids), sum(map(len, ids))

    async def in_turn() -> tuple[Any, int]:
        async with service.places:
            return await run_in_threadpool(embed)

    vectors, tokens = await while_connected(request, in_turn())
    base = body.encoding_format == "base64"
    reply = {
        "object": "list",
        "model": name,
        "data": [
            {"object": "embedding", "index": place, "embedding": _base64(vector) if base else vector.tolist()}
            for place, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return JSONResponse(reply)


def _base64(vector: Any) -> str:
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode("ascii")

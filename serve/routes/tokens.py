"""POST /tokenize, /detokenize and /apply-template, as llama.cpp's server has them."""

from __future__ import annotations

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..api.schemas import ConversationBody, DetokenizeBody, TokenizeBody, parsed
from ..errors import RequestError
from ..service import Service
from .chat import conversation_of


def _codec(service: Service) -> Any:
    codec = service.model.tokenizer
    if codec is None:
        raise RequestError("this bundle has no tokenizer", code="no_tokenizer")
    return codec


async def tokenize(service: Service, request: Request, raw: bytes) -> Response:
    """The token ids of a text."""
    body, codec = parsed(TokenizeBody, raw), _codec(service)

    def encoded() -> list[int]:
        return list(codec.encode(body.content, add_special_tokens=body.add_special)) if body.content else []

    tokens: list[Any] = await run_in_threadpool(encoded)
    if body.with_pieces:
        tokens = [{"id": token, "piece": _piece(*service.pieces(token))} for token in tokens]
    return JSONResponse({"tokens": tokens})


def _piece(text: str, written: list[int]) -> str | list[int]:
    """A text, or the bytes of a part of a character."""
    return text if list(text.encode()) == written else written


async def detokenize(service: Service, request: Request, raw: bytes) -> Response:
    """The text of token ids."""
    body, codec = parsed(DetokenizeBody, raw), _codec(service)
    size = service.model.manifest.vocab_size
    if any(token >= size for token in body.tokens):
        raise RequestError(f"token ids are from 0 to {size - 1}", param="tokens")
    content = await run_in_threadpool(codec.decode, body.tokens, keep_special_tokens=True)
    return JSONResponse({"content": content})


async def apply_template(service: Service, request: Request, raw: bytes) -> Response:
    """The text that messages become."""
    body = parsed(ConversationBody, raw)
    given = {name: value for name, value in conversation_of(body).items() if name != "tool_choice"}
    prompt = await run_in_threadpool(lambda: service.model.chat_text(**given))
    return JSONResponse({"prompt": prompt})

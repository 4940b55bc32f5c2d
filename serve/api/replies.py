"""The shapes of replies, and the parts that several routes share."""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence
from typing import Any, Literal

from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

from pastkey.runtime import Completion, TokenLogprob

from ..service import Service

_LETTERS = string.ascii_letters + string.digits
FinishReason = Literal["stop", "length", "tool_calls"]


class PromptDetails(TypedDict):
    """Of usage."""

    cached_tokens: int


class Usage(TypedDict):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(TypedDict):
    """A likely token."""

    token: str
    logprob: float
    bytes: list[int]


class Logprob(TopLogprob):
    """A token of the text, and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class Logprobs(TypedDict):
    """The tokens of a text."""

    content: list[Logprob]
    refusal: None


class FunctionCall(TypedDict):
    """A function that is called, with its arguments as JSON."""

    name: str
    arguments: str


class Call(TypedDict):
    """A tool call."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Answer(TypedDict, total=False):
    """A message of the model."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[Call]


class ChatChoice(TypedDict):
    """An answer."""

    index: int
    message: Answer
    logprobs: Logprobs | None
    finish_reason: FinishReason


class ChatReply(TypedDict):
    """Of chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(TypedDict):
    """The tokens of a text, in columns."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(TypedDict):
    """A continuation."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextReply(TypedDict):
    """Of completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class ErrorDetails(TypedDict):
    """Of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(TypedDict):
    """Of a request that failed."""

    error: ErrorDetails


def new_id(prefix: str, length: int = 24) -> str:
    """An id that no other reply has."""
    return prefix + "".join(secrets.choice(_LETTERS) for _ in range(length))


def call_id() -> str:
    """The id of a tool call. Mistral's templates require nine letters and digits."""
    return new_id("", 9)


def usage_of(completions: Sequence[Completion], n: int) -> Usage:
    """The numbers of a job. The continuations of a prompt share its tokens."""
    prompt = sum(completion.prompt_tokens for completion in completions[::n])
    new = sum(completion.new_tokens for completion in completions)
    cached = sum(completion.cached_tokens for completion in completions[::n])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def finish_reason(completion: Completion) -> FinishReason:
    """Why a text ended, in OpenAI's words."""
    if completion.tool_calls:
        return "tool_calls"
    return "length" if completion.finish_reason in ("length", "deadline") else "stop"


def logprobs_of(service: Service, found: Sequence[TokenLogprob]) -> list[Logprob]:
    """Log-probabilities in the form of chat/completions."""

    def one(token: int, logprob: float) -> TopLogprob:
        text, written = service.pieces(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": written}

    return [
        {**one(each.id, each.logprob), "top_logprobs": [one(token, logprob) for token, logprob in each.top]}
        for each in found
    ]


def text_logprobs(service: Service, found: Sequence[TokenLogprob | None], ids: Sequence[int]) -> TextLogprobs:
    """Log-probabilities in the form of completions. `ids`: all tokens; the first one of a prompt has none."""
    columns: TextLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    offset = 0
    for token, each in zip(ids, found, strict=True):
        text = service.pieces(token)[0]
        columns["tokens"].append(text)
        columns["token_logprobs"].append(None if each is None else _finite(each.logprob))
        top: dict[str, float] = {}
        for other, logprob in each.top if each is not None else ():
            top.setdefault(service.pieces(other)[0], _finite(logprob))  # of tokens with one text, the likeliest
        columns["top_logprobs"].append(None if each is None else top)
        columns["text_offset"].append(offset)
        offset += len(text)
    return columns


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity; OpenAI's number for it


def head(service: Service, kind: str, identity: str, created: int, model: str) -> dict[str, Any]:
    """The fields that every chunk of a stream has."""
    return {
        "id": identity,
        "object": kind,
        "created": created,
        "model": model,
        "system_fingerprint": service.fingerprint,
    }

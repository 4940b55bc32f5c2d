"""The shapes of replies, and the parts that several routes share."""

from __future__ import annotations

import secrets
import string
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

from pastkey.runtime import Completion, TokenLogprob

from ..events import Writer, event
from ..service import Running, Service

_LETTERS = string.ascii_letters + string.digits
FinishReason = Literal["stop", "length", "tool_calls"]


class _Reply(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]


class ChatReply(_Reply):
    """Body of a chat completion: OpenAI's ChatCompletion."""

    object: Literal["chat.completion"]


class TextReply(_Reply):
    """Body of a completion: OpenAI's Completion."""

    object: Literal["text_completion"]


class ErrorReply(TypedDict):
    """Body of an error: "message", "type", "param" and "code"."""

    error: dict[str, str | None]


def new_id(prefix: str, length: int = 24) -> str:
    """An id that no other reply has."""
    return prefix + "".join(secrets.choice(_LETTERS) for _ in range(length))


def call_id() -> str:
    """The id of a tool call. Mistral's templates require nine letters and digits."""
    return new_id("", 9)


def usage_of(completions: Sequence[Completion], n: int) -> dict[str, Any]:
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


def logprobs_of(service: Service, found: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Log-probabilities in the form of chat/completions."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        text, written = service.pieces(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": written}

    return [
        {**one(each.id, each.logprob), "top_logprobs": [one(token, logprob) for token, logprob in each.top]}
        for each in found
    ]


def text_logprobs(
    service: Service, found: Sequence[TokenLogprob | None], ids: Sequence[int], offset: int = 0
) -> dict[str, list[Any]]:
    """Log-probabilities in the form of completions.

    Args:
        service: The service.
        found: Of each token; the first one of a prompt has none.
        ids: The tokens.
        offset: Number of characters before them.
    """
    columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
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


class ChoiceWriter(Writer):
    """Writes the replies with choices: one for each text, and the usage at the end."""

    kind: str  # OpenAI's word for the reply
    chunk_kind: str  # and for an event of it

    def __init__(self, service: Service, body: Any, running: Running, prefix: str) -> None:
        """`prefix`: of the reply's id."""
        self.service, self.body, self.job = service, body, running.job
        self._head = {
            "id": new_id(prefix),
            "created": running.created,
            "model": running.name,
            "system_fingerprint": service.fingerprint,
        }
        self._usage = body.stream_options is not None and body.stream_options.include_usage

    @abstractmethod
    def choice(self, place: int, completion: Completion) -> dict[str, Any]:
        """The whole choice."""

    @abstractmethod
    def last(self, place: int, completion: Completion) -> str:
        """The last event of a choice."""

    def event(self, place: int, content: Mapping[str, Any], reason: str | None = None, logprobs: Any = None) -> str:
        """An event of a choice."""
        choice = {"index": place, **content, "logprobs": logprobs, "finish_reason": reason}
        return self._event([choice], None)

    def end(self, completions: Sequence[Completion]) -> Iterator[str]:
        """See Writer."""
        for place, completion in enumerate(completions):
            yield self.last(place, completion)
        if self._usage:
            yield self._event([], usage_of(completions, self.body.n))

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """See Writer."""
        choices = [self.choice(place, completion) for place, completion in enumerate(completions)]
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage_of(completions, self.body.n)}

    def _event(self, choices: list[Any], usage: Any) -> str:
        told = {"usage": usage} if self._usage else {}
        return event({**self._head, "object": self.chunk_kind, "choices": choices, **told})

"""The results of a generation: the chunks of a stream, and the completion at its end."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, TypeVar

from ..sampling.log_probs import TokenLogprob
from ..text.tool_call_stream import ToolCallDelta

Result = TypeVar("Result")


class ToolCall(TypedDict):
    """A function call that the model requests.

    Attributes:
        name: The function's name.
        arguments: Its arguments by name, as JSON values.
    """

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """A piece of a stream: one token, or the rest of the text at the end.

    Attributes:
        text: Whole characters only. "" while a character or a stop string is incomplete, and without a tokenizer.
        ids: The token; empty for the rest of the text.
        logprobs: The token's log-probability, if `logprobs` was given.
        tool_calls: The tool calls, in the last chunk of an answer that has some. They are not in `text`.
    """

    text: str
    ids: list[int]
    logprobs: list[TokenLogprob] = field(default_factory=list)
    tool_calls: list[ToolCallDelta] = field(default_factory=list)


@dataclass(frozen=True)
class Completion:
    """The result of one request.

    Attributes:
        text: The text of `ids`, without special tokens by default. It ends before the stop string, before an
            incomplete character, and before tool calls. "" without a tokenizer.
        ids: The new tokens, without the EOS token, including those of a stop string.
        finish_reason: "stop" for an EOS token or a met constraint, "stop_string" for one of `stop`, "length" for
            `max_new_tokens` or the end of the context, "deadline" for `timeout`, "cancelled" if the caller ended it.
        prompt_tokens: Number of tokens of the prompt.
        new_tokens: Number of `ids`.
        prefill_seconds: Seconds to the first token.
        decode_seconds: Seconds for the other tokens. With concurrent requests, both include waiting.
        cached_tokens: Number of prompt tokens that were in the KV cache already.
        stop_string: The one of `stop` that ended the text, or None. Of two with the same beginning, the shorter one.
        tool_calls: The function calls of an answer with tools, in order.
        draft_tokens: Number of tokens that prompt lookup or the draft model drafted.
        accepted_tokens: Number of accepted draft tokens.
        logprobs: Log-probabilities of `ids`, if `logprobs` was given.
        prompt_logprobs: Log-probabilities of the prompt's tokens, None for the first, if `prompt_logprobs` was given.
        forced_tokens: Number of tokens that a constraint forced, without sampling.
        dropped_tokens: Number of tokens that left the context, with `context_overflow="shift"`.
    """

    text: str
    ids: list[int]
    finish_reason: Literal["stop", "length", "stop_string", "cancelled", "deadline"]
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    cached_tokens: int = 0
    stop_string: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)
    draft_tokens: int = 0
    accepted_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    forced_tokens: int = 0
    dropped_tokens: int = 0

    @property
    def seconds_per_token(self) -> float:
        """Mean seconds of the tokens after the first; 0 if there are none."""
        return self.decode_seconds / (self.new_tokens - 1) if self.new_tokens > 1 else 0.0


def completed(stream: Generator[object, None, Result]) -> Result:
    """Reads a stream to its end and returns its result."""
    with contextlib.closing(stream):  # the traceback of an interrupt would keep it alive
        while True:
            try:
                next(stream)
            except StopIteration as end:
                result: Result = end.value
                return result

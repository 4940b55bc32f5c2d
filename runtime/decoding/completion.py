"""The results of a generation: the chunks of a stream, and the completion at its end."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, TypeVar

from ..sampling.log_probs import TokenLogprob

Result = TypeVar("Result")


class ToolCall(TypedDict):
    """A function call that the model asks for.

    Attributes:
        name: The function's name.
        arguments: Its arguments by name, as JSON has them.
    """

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """A piece of a stream: one token, or the rest of the text at the end.

    Attributes:
        text: Whole characters only. "" while a character or a stop string is incomplete, and without a tokenizer.
        ids: The token, or none for the rest of the text.
        logprobs: That of the token, if `logprobs` was given.
    """

    text: str
    ids: list[int]
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True)
class Completion:
    """One continuation.

    Attributes:
        text: The text of `ids`, without special tokens by default. It ends before the stop string, and before an
            incomplete character. "" without a tokenizer.
        ids: The new tokens, without the EOS token, with those of a stop string.
        finish_reason: "stop" for an EOS token, or a complete constrained text, "stop_string" for one of `stop`,
            "length" for `max_new_tokens` or the end of the context, "deadline" for `timeout`, "cancelled" if it was
            ended from outside.
        prompt_tokens: Number of tokens of the prompt.
        new_tokens: Number of `ids`.
        prefill_seconds: Time to the first token.
        decode_seconds: Time for the others. With other requests at the same time, both include waiting.
        cached_tokens: Number of the prompt's tokens that were in the KV cache already.
        stop_string: The one of `stop` that ended the text, or None. Of two with the same beginning, the shorter one.
        tool_calls: The function calls of a Chat's answer, in order.
        draft_tokens: Number of tokens that prompt lookup or the draft model drafted.
        accepted_tokens: Number of draft tokens that the sampler chose.
        logprobs: Those of each of `ids`, if `logprobs` was given.
        prompt_logprobs: Those of each of the prompt's tokens, None for the first, if `prompt_logprobs` was given.
        forced_tokens: Number of tokens that a constraint forced; they were run together.
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
    def seconds_to_first_token(self) -> float:
        """As `prefill_seconds`."""
        return self.prefill_seconds

    @property
    def seconds_per_token(self) -> float:
        """Mean time of a token after the first; 0 without one."""
        return self.decode_seconds / (self.new_tokens - 1) if self.new_tokens > 1 else 0.0


def completed(stream: Generator[object, None, Result]) -> Result:
    """What a stream, or one of several prompts, returns at its end."""
    with contextlib.closing(stream):  # an interrupt's traceback keeps it from being collected
        while True:
            try:
                next(stream)
            except StopIteration as end:
                result: Result = end.value
                return result

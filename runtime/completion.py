"""What a generation gives: a chunk of a stream, and the whole at its end."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict


class ToolCall(TypedDict):
    """A function that the model wants called.

    Attributes:
        name: The function's name.
        arguments: Its arguments by name, as JSON has them.
    """

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """A piece of a stream: one token, or the text that was held back at the end.

    Attributes:
        text: Whole characters only. "" while a character or a stop string is incomplete, and without a tokenizer.
        ids: The token, or none for the text that was held back.
    """

    text: str
    ids: list[int]


@dataclass(frozen=True)
class Completion:
    """One continuation.

    Attributes:
        text: The text of `ids`, special tokens left out unless they were to be kept. It ends before the stop string,
            and before a character that the last token leaves incomplete. "" without a tokenizer.
        ids: The new tokens, without the EOS token, with those of a stop string.
        finish_reason: "stop" for an EOS token, "stop_string" for one of `stop`, "length" for `max_new_tokens` or the
            end of the context, "deadline" for `timeout`, "cancelled" where it was ended from outside.
        prompt_tokens: Number of tokens of the prompt.
        new_tokens: Number of `ids`.
        prefill_seconds: Time to the first token.
        decode_seconds: Time for the others. Beside other generations both are what this one waited for.
        cached_tokens: Number of the prompt's tokens whose keys and values were in the cache already.
        stop_string: The one of `stop` that ended the text, or None. Of two that begin alike, the shorter one.
        tool_calls: Of a Chat's answer, the functions that it calls, in order.
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

    @property
    def reused_tokens(self) -> int:
        """As `cached_tokens`."""
        return self.cached_tokens


def completed(stream: Generator[Chunk, None, Completion]) -> Completion:
    """What a stream returns at its end."""
    with contextlib.closing(stream):  # an interrupt's traceback keeps it from being collected
        while True:
            try:
                next(stream)
            except StopIteration as end:
                completion: Completion = end.value
                return completion

"""An answer of a conversation, token by token: each token enters the conversation as it is yielded."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from types import TracebackType
from typing import Any, Protocol

from ...decoding.completion import Chunk, Completion
from ...text.messages import message


class Conversation(Protocol):
    """The Chat, as far as its answer needs it."""

    messages: list[dict[str, Any]]
    format: Any

    def taken_in(self, messages: list[dict[str, Any]], text: str, completion: Completion) -> Completion:
        """Puts the whole answer into the conversation."""


class AnswerStream(Generator[Chunk, None, Completion]):
    """Yields a Chunk for each new token; returns the Completion, with its tool calls.

    An error leaves the conversation as it was. A stream that is closed before its end leaves the answer in the
    conversation as far as it came.

    Attributes:
        completion: The value of StopIteration. None before the end; after an early `close` what was yielded until then.
    """

    def __init__(self, chat: Conversation, messages: list[dict[str, Any]], stream: Any, cut: str | None) -> None:
        """Reads nothing yet.

        Args:
            chat: The conversation.
            messages: What is answered, without the beginning of an answer that goes on.
            stream: The model's: a Stream or a SandboxedStream.
            cut: That beginning, or None.
        """
        self._chat, self._messages, self._stream, self._cut = chat, messages, stream, cut or ""
        self._before, self._said, self._space = chat.messages, self._cut, ""
        self._over = False
        self.completion: Completion | None = None

    def __next__(self) -> Chunk:
        if self._over:
            raise StopIteration
        try:
            chunk: Chunk = next(self._stream)
        except StopIteration as end:
            self._over = True
            found = dataclasses.replace(end.value, text=self._space + end.value.text)
            self.completion = self._chat.taken_in(self._messages, self._cut + found.text, found)
            raise StopIteration(self.completion) from None
        except BaseException as error:
            self.close()
            if isinstance(error, Exception):
                self._chat.messages = self._before
            raise
        if self._cut and self._said == self._cut and chunk.ids and self._chat.format.loses_space(chunk.ids[0]):
            self._space = " "  # a decoder drops it where a text begins, and this one goes on
            chunk = dataclasses.replace(chunk, text=self._space + chunk.text)
        self._said += chunk.text
        self._chat.messages = [*self._messages, message("assistant", self._said)]
        return chunk

    def send(self, value: None) -> Chunk:
        """As `next`."""
        del value
        return next(self)

    def throw(
        self,
        kind: type[BaseException] | BaseException,
        value: BaseException | object = None,
        traceback: TracebackType | None = None,
    ) -> Chunk:
        """Ends it, and raises the error."""
        self.close()
        found: Chunk = self._stream.throw(kind, value, traceback)
        return found

    def cancel(self) -> None:
        """Ends it within one step, from any thread: whoever reads it gets the end, with what was generated so far."""
        self._stream.cancel()

    def close(self) -> None:
        """Ends it within one step; no more can be read."""
        self._over = True
        self._stream.close()
        self.completion = self.completion or self._stream.completion

"""An answer of a conversation, token by token: each token enters the conversation as it is yielded."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from ...decoding.completion import Chunk, Completion
from ...decoding.stream import ChunkStream
from ...text.messages import message


class Conversation(Protocol):
    """The Chat, as far as its answer needs it."""

    messages: list[dict[str, Any]]
    format: Any

    def taken_in(self, messages: list[dict[str, Any]], text: str, completion: Completion) -> Completion:
        """Puts the whole answer into the conversation."""


class AnswerStream(ChunkStream):
    """Yields a Chunk for each new token; returns the Completion, with its tool calls.

    An error leaves the conversation as it was. A stream that is closed before its end leaves the answer in the
    conversation as far as it came.
    """

    def __init__(
        self, chat: Conversation, messages: list[dict[str, Any]], stream: ChunkStream, cut: str | None
    ) -> None:
        """Reads nothing yet.

        Args:
            chat: The conversation.
            messages: What is answered, without the beginning of an answer that goes on.
            stream: The model's.
            cut: That beginning, or None.
        """
        super().__init__()
        self._chat, self._messages, self._stream, self._cut = chat, messages, stream, cut or ""
        self._before, self._said, self._space = chat.messages, self._cut, ""
        self._over = False

    def _next(self) -> Chunk:
        if self._over:
            raise StopIteration
        try:
            chunk = next(self._stream)
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

    def cancel(self) -> None:
        """Ends it within one step, from any thread: whoever reads it gets the end, with what was generated so far."""
        self._stream.cancel()

    def close(self) -> None:
        """Ends it within one step; no more can be read."""
        self._over = True
        self._stream.close()
        self.completion = self.completion or self._stream.completion

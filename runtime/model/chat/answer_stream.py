"""An answer of a conversation, token by token: each token enters the conversation as it is yielded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pastkey.errors import InputError

from ...decoding.completion import Chunk, ToolCall
from ...decoding.stream import ChunkStream
from ...text.messages import message


class Conversation(Protocol):
    """The Chat, as far as its answer needs it."""

    messages: list[dict[str, Any]]

    def taken_in(self, messages: list[dict[str, Any]], text: str, calls: Sequence[ToolCall]) -> None:
        """Puts the whole answer into the conversation."""


class AnswerStream(ChunkStream):
    """Yields a Chunk for each new token; returns the Completion, with its tool calls.

    Only one answer of a conversation may be read at a time. An error leaves the conversation as it was. A stream that
    is closed early leaves the answer so far in the conversation.
    """

    def __init__(
        self, chat: Conversation, messages: list[dict[str, Any]], stream: ChunkStream, cut: str | None
    ) -> None:
        """Reads nothing yet.

        Args:
            chat: The conversation.
            messages: What is answered, without the beginning of an answer that goes on.
            stream: The answer.
            cut: That beginning, or None.
        """
        super().__init__()
        self._chat, self._messages, self._stream, self._cut = chat, messages, stream, cut or ""
        self._before, self._said = chat.messages, self._cut
        self._written = chat.messages  # by this answer; another list means that another call took the turn
        self._over = False

    def _next(self) -> Chunk:
        if self._over:
            raise StopIteration
        try:
            chunk = next(self._stream)
        except StopIteration as end:
            self._require_turn()
            self._over = True
            self.completion = found = end.value
            self._chat.taken_in(self._messages, self._cut + found.text, found.tool_calls)
            raise StopIteration(found) from None
        except BaseException as error:
            self.close()
            if isinstance(error, Exception) and self._chat.messages is self._written:
                self._chat.messages = self._before
            raise
        self._require_turn()
        self._said += chunk.text
        self._chat.messages = self._written = [*self._messages, message("assistant", self._said)]
        return chunk

    def _require_turn(self) -> None:
        """Ends the answer with an InputError if another call has changed the conversation."""
        if self._chat.messages is not self._written:
            self.close()
            raise InputError(
                "the conversation has changed since this answer began: ask one question at a time, or make a chat for "
                "each"
            )

    def cancel(self) -> None:
        """Ends it within one step, from any thread: whoever reads it gets the end, with what was generated so far."""
        self._stream.cancel()

    def close(self) -> None:
        """Ends it within one step; no more can be read."""
        self._over = True
        self._stream.close()
        self.completion = self.completion or self._stream.completion

"""An answer as it is written: the model's stream, with tool calls apart from the text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

from ...decoding.completion import Chunk, Completion, ToolCall
from ...decoding.stream import ChunkStream
from ...text.tool_call_stream import ToolCallReader


class Turn:
    """Receives an answer as it is written. This one keeps nothing; a Chat has its own."""

    def take(self, text: str) -> None:
        """Receives the text of a chunk."""

    def end(self, completion: Completion) -> None:
        """Receives the whole answer."""

    def fail(self) -> None:
        """Forgets the answer, which an error ended."""


class ChatStream(ChunkStream):
    """Yields a Chunk for each new token; the Completion has the tool calls.

    If a call turns out to be malformed, the completion's text is the whole answer, and it has no call. An error leaves
    a conversation as it was. A stream that is closed early leaves the answer so far in it.
    """

    def __init__(self, stream: ChunkStream, reader: ToolCallReader, loses_space: Callable[[int], bool]) -> None:
        """Reads nothing yet.

        Args:
            stream: The model's.
            reader: It has read the beginning of the answer, if the model continues one.
            loses_space: See `ChatFormat`.
        """
        super().__init__()
        self._stream, self._reader, self._loses_space = stream, reader, loses_space
        self._cut = len(reader.text)  # length of that beginning
        self._texts: list[str] = []
        self._whole: Completion | None = None
        self.turn = Turn()

    def _next(self) -> Chunk:
        turn = self.turn
        try:
            chunk = self._read()
            turn.take(chunk.text)
        except StopIteration:
            raise
        except BaseException as error:
            self.close()
            if isinstance(error, Exception):
                turn.fail()
            raise
        return chunk

    def _read(self) -> Chunk:
        if self._whole is not None:
            raise self._ended()
        try:
            chunk = next(self._stream)
        except StopIteration as end:
            if end.value is None:  # it was closed
                raise
            self._whole = end.value
            rest, late, said, calls = self._reader.end()
            text = said[self._cut :] if calls or self._cut < len(said) else "".join(self._texts) + rest
            self.completion = dataclasses.replace(self._whole, text=text, tool_calls=cast(list[ToolCall], calls))
            if rest or late:
                return Chunk(rest, [], tool_calls=late)
            raise self._ended() from None
        text = chunk.text
        if self._cut and len(self._reader.text) == self._cut and chunk.ids and self._loses_space(chunk.ids[0]):
            text = " " + text  # a decoder drops it where a text begins, and this one continues
        self._texts.append(content := self._reader.push(text))
        return dataclasses.replace(chunk, text=content)

    def _ended(self) -> StopIteration:
        assert self.completion is not None
        turn, self.turn = self.turn, Turn()
        turn.end(self.completion)
        return StopIteration(self.completion)

    def cancel(self) -> None:
        """Ends it within one step, from any thread. The reader gets the end, with the text so far."""
        self._stream.cancel()

    def close(self) -> None:
        """Ends it within one step; no more can be read."""
        self.turn = Turn()
        self._stream.close()
        if self.completion is None and self._stream.completion is not None:
            self.completion = dataclasses.replace(self._stream.completion, text="".join(self._texts))

"""An answer as it is written: the model's stream, with tool calls apart from the text."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import cast

from pastkey.errors import InputError

from ...decoding.completion import Chunk, Completion, ToolCall
from ...decoding.stream import ChunkStream
from ...text.tool_call_stream import ToolCallReader


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
        self.ended: Callable[[Completion], object] | None = None  # told once, of the whole answer or of what there is

    def _next(self) -> Chunk:
        try:
            return self._read()
        except StopIteration:
            raise
        except BaseException as error:
            if isinstance(error, Exception):
                self.ended = None
            self.close()
            raise

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
            text = " " + text  # a decoder drops it where a text begins, and this one goes on
        self._texts.append(content := self._reader.push(text))
        return dataclasses.replace(chunk, text=content)

    def _ended(self) -> StopIteration:
        assert self.completion is not None
        ended, self.ended = self.ended, None
        if ended is not None:
            ended(self.completion)
        return StopIteration(self.completion)

    def cancel(self) -> None:
        """Ends it within one step, from any thread. The reader gets the end, with what was generated so far."""
        self._stream.cancel()

    def close(self) -> None:
        """Ends it within one step; no more can be read."""
        self._stream.close()
        if self.completion is None and self._stream.completion is not None:
            self.completion = dataclasses.replace(self._stream.completion, text="".join(self._texts))
        if self.completion is not None and self._texts:
            with contextlib.suppress(InputError):  # the conversation has changed: it keeps nothing of this
                self._ended()

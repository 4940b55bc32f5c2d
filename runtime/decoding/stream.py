"""A stream: the tokens of a generation as pieces of text, until it ends, is closed or is cancelled."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

from pastkey.errors import InputError

from ..text.codec import TextStream
from ..text.stop_strings import StopStrings
from .completion import Chunk, Completion
from .generation import Generation

Piece = TypeVar("Piece")
Whole = TypeVar("Whole")


class Readable(Generator[Piece, None, Whole]):
    """The base of all streams: one reader at a time, which may be any thread or task.

    A subclass has `_next`, which returns a piece or raises StopIteration of the whole, `cancel` and `close`.
    """

    def __init__(self) -> None:
        self._reading = threading.Lock()  # held by the reader

    def __next__(self) -> Piece:
        if not self._reading.acquire(blocking=False):
            raise InputError(
                "this stream is being read by another thread or task, or by its own callback: let one read it at "
                "a time, or give each a separate stream"
            )
        try:
            return self._next()
        finally:
            self._reading.release()

    @abstractmethod
    def _next(self) -> Piece:
        """The next piece."""

    @abstractmethod
    def cancel(self) -> None:
        """Ends it within one step, from any thread. The reader gets the end, with the text so far."""

    def send(self, value: None) -> Piece:
        """As `next`."""
        del value
        return next(self)

    def throw(self, kind: Any, value: Any = None, traceback: TracebackType | None = None) -> Piece:
        """Ends it, and raises the error: a class or an exception."""
        self.close()
        return super().throw(kind, value, traceback)

    def __reduce__(self) -> NoReturn:
        """Raises InputError: a copy would end this one."""
        raise InputError(
            "a stream can be neither copied nor pickled: give the model and the prompt to the other process, and begin "
            "the stream there"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class ChunkStream(Readable[Chunk, Completion]):
    """A stream of one text.

    Attributes:
        completion: The Completion after the end; after `close`, with the yielded chunks. None before.
    """

    completion: Completion | None = None

    def __repr__(self) -> str:
        ended = self.completion
        state = "unfinished" if ended is None else f"{ended.new_tokens} tokens, {ended.finish_reason}"
        return f"<{type(self).__name__}, {state}>"


class Stream(ChunkStream):
    """Yields a Chunk for each new token; their texts together are the completion's.

    It uses no resources until its first `next`. It belongs to no thread: each `next` may come from another one, and
    `cancel` and `close` from any, also while another is inside `next`. Several streams of one model are advanced in any
    order. One that is closed, cancelled or collected leaves the model within one step.
    """

    def __init__(
        self,
        generation: Generation,
        text: TextStream | None,
        stops: StopStrings,
        wake: Callable[[], None],
    ) -> None:
        """`wake` lets a thread that waits for the next token look again."""
        super().__init__()
        self._generation, self._wake = generation, wake
        self._text, self._stops = text, stops
        self._texts: list[str] = []  # the text so far
        self._flushed = self._over = False

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return self._generation.prompt_tokens

    def _next(self) -> Chunk:
        """The next token with its text, or at the end the text that was held back; then the completion."""
        generation, text, stops = self._generation, self._text, self._stops
        try:
            if self._over:
                raise StopIteration
            token = next(generation, None) if stops.found is None and not self._flushed else None
            if token is not None:
                self._texts.append("" if text is None else stops.push(text.push(token)))
                new = generation.new_tokens
                return Chunk(self._texts[-1], [token], generation.logprobs[new - 1 : new])
            if text is not None and not self._flushed:
                self._flushed = True
                self._texts.append(stops.push(text.flush()) + stops.flush())
                if self._texts[-1]:
                    return Chunk(self._texts[-1], [])
            raise StopIteration(self._end())
        except BaseException:
            self._end()
            raise

    def _end(self) -> Completion:
        """Lets go of the model. The completion, once and for all."""
        self._over = True
        generation = self._generation
        generation.close()
        if self.completion is None:
            reason = generation.finish_reason if self._stops.found is None else "stop_string"
            new, found = generation.new_tokens, generation.logprobs
            self.completion = Completion(
                "".join(self._texts),
                generation.ids[generation.prompt_tokens : generation.prompt_tokens + new],
                reason or "cancelled",
                generation.prompt_tokens,
                new,
                generation.prefill_seconds,
                generation.decode_seconds,
                generation.cached_tokens,
                self._stops.found,
                draft_tokens=generation.draft_tokens,
                accepted_tokens=generation.accepted_tokens,
                logprobs=found[:new],
                prompt_logprobs=generation.prompt_logprobs,
                forced_tokens=generation.forced_tokens,
                dropped_tokens=generation.kept.dropped,
            )
        return self.completion

    def cancel(self) -> None:
        """Ends it within one step, from any thread. The reader gets the end, with the text so far."""
        self._generation.cancel()
        self._wake()

    def close(self) -> None:
        """Ends it within one step; no more can be read. Never waits."""
        self._generation.cancel()
        if self._reading.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._reading.release()
        else:  # another thread is inside, and comes to the end now
            self._wake()
            self._generation.close()

    def __del__(self) -> None:
        generation = vars(self).get("_generation")
        if generation is not None:
            generation.close()

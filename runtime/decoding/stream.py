"""A stream: the tokens of a generation as pieces of text, until it ends, is closed or is cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import NoReturn, Self, TypeVar

from pastkey.errors import InputError

from ..text.codec import TextStream
from ..text.stop_strings import StopStrings
from .completion import Chunk, Completion
from .generation import Generation

T = TypeVar("T")


def next_of(steps: Iterator[T]) -> T:
    """The next of a generator. Raises InputError where another thread, or a callback, reads it at this moment."""
    try:
        return next(steps)
    except ValueError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:  # of no line of its own
            raise read_already() from None
        raise


def read_already() -> InputError:
    """For who reads a stream while another does."""
    return InputError(
        "this stream is being read by another thread or task, or by a callback of its own: let one read it at a time, "
        "or give each a stream of its own"
    )


class Stream(Generator[Chunk, None, Completion]):
    """Yields a Chunk for each new token; their texts together are the completion's.

    It takes nothing until its first `next`. It belongs to no thread: each `next` may come from another one, and
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
        self._generation, self._wake = generation, wake
        self._text, self._stops = text, stops
        self._texts: list[str] = []  # what was told so far
        self._flushed = self._over = False
        self._reading = threading.Lock()  # held by whoever reads
        self._result: Completion | None = None

    @property
    def completion(self) -> Completion | None:
        """What it returns at its end; also after `close`, with what was yielded until then. None before."""
        return self._result

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return self._generation.prompt_tokens

    def __next__(self) -> Chunk:
        if not self._reading.acquire(blocking=False):
            raise read_already()
        try:
            if self._over:
                raise StopIteration
            chunk = self._read()
            if chunk is None:
                raise StopIteration(self._end())
            return chunk
        except BaseException:
            self._end()
            raise
        finally:
            self._reading.release()

    def _read(self) -> Chunk | None:
        """The next token with its text, or at the end the text that was held back; then None."""
        generation, text, stops = self._generation, self._text, self._stops
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
        return None

    def _end(self) -> Completion:
        """Lets go of the model. The completion, once and for all."""
        self._over = True
        generation = self._generation
        generation.close()
        if self._result is None:
            reason = generation.finish_reason if self._stops.found is None else "stop_string"
            new, found = generation.new_tokens, generation.logprobs
            self._result = Completion(
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
        return self._result

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
        del traceback
        self.close()
        raise kind(*([] if value is None else [value])) if isinstance(kind, type) else kind

    def cancel(self) -> None:
        """Ends it within one step, from any thread: whoever reads it gets the end, with what was generated so far."""
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

    def __reduce__(self) -> NoReturn:
        """Raises InputError: a copy would end this one."""
        raise InputError(
            "a stream can be neither copied nor pickled: give the model and the prompt to the other process, and begin "
            "the stream there"
        )

    def __del__(self) -> None:
        generation = vars(self).get("_generation")
        if generation is not None:
            generation.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

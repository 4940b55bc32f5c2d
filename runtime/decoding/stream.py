"""A stream: the tokens of a generation as pieces of text, until it ends, is closed or is cancelled."""

from __future__ import annotations

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
        self._told = _Told(generation, stops)
        self._chunks = _run(self._told, text)  # which knows nothing of this object, so that it is collected at once

    @property
    def completion(self) -> Completion | None:
        """What it returns at its end; also after `close`, with what was yielded until then. None before."""
        return self._told.completion

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return self._generation.prompt_tokens

    def __next__(self) -> Chunk:
        return next_of(self._chunks)

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
        try:
            self._chunks.close()
        except ValueError:  # another thread is inside, and comes to the end now
            self._wake()
        self._generation.close()
        self._told.complete()

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


class _Told:
    """What a stream has told so far."""

    def __init__(self, generation: Generation, stops: StopStrings) -> None:
        self.generation, self.stops = generation, stops
        self.texts: list[str] = []
        self.completion: Completion | None = None

    def complete(self) -> Completion:
        """The completion, once and for all."""
        if self.completion is None:
            generation = self.generation
            reason = generation.finish_reason if self.stops.found is None else "stop_string"
            new, found = generation.new_tokens, generation.logprobs
            self.completion = Completion(
                "".join(self.texts),
                generation.ids[generation.prompt_tokens : generation.prompt_tokens + new],
                reason or "cancelled",
                generation.prompt_tokens,
                new,
                generation.prefill_seconds,
                generation.decode_seconds,
                generation.cached_tokens,
                self.stops.found,
                draft_tokens=generation.draft_tokens,
                accepted_tokens=generation.accepted_tokens,
                logprobs=found[:new],
                prompt_logprobs=generation.prompt_logprobs,
                forced_tokens=generation.forced_tokens,
                dropped_tokens=generation.kept.dropped,
            )
        return self.completion


def _run(told: _Told, text: TextStream | None) -> Generator[Chunk, None, Completion]:
    stops, texts = told.stops, told.texts
    try:
        for token in told.generation:
            texts.append("" if text is None else stops.push(text.push(token)))
            new = told.generation.new_tokens
            yield Chunk(texts[-1], [token], told.generation.logprobs[new - 1 : new])
            if stops.found is not None:
                break
        if text is not None:
            texts.append(stops.push(text.flush()) + stops.flush())
            if texts[-1]:
                yield Chunk(texts[-1], [])
    finally:
        told.generation.close()
        completion = told.complete()
    return completion

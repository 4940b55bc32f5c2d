"""Several prompts at the same time: each as if alone, the results in order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, TypeVar

import numpy as np

from pastkey.errors import InputError
from pastkey.values import is_int, require, shown

from ..sampling.random_stream import continuation_seed, fresh_seed
from ..settings import SamplingConfig
from .batching.shared_prefill import SharedPrefills
from .completion import Chunk, Completion
from .stream import Readable, Stream

MAX_CONTINUATIONS = 10_000  # of a prompt; each begins with some kilobytes of its own
Key = TypeVar("Key")
Open = Callable[[Any, Mapping[str, Any], SharedPrefills | None], Stream]


def several(prompt: object) -> bool:
    """Whether this is a sequence of prompts."""
    if isinstance(prompt, str | bytes | bytearray | memoryview | dict | set | frozenset):
        return False
    if getattr(prompt, "ndim", None) is not None:
        return bool(getattr(prompt, "ndim", 0) == 2)
    if not isinstance(prompt, Sequence) or not prompt:
        return False
    return all(isinstance(one, str) or (hasattr(one, "__len__") and hasattr(one, "__iter__")) for one in prompt)


def token_ids(given: object, name: str, expected: str, vocab_size: int) -> list[int]:
    """`given` as a list of whole numbers. Raises InputError, which calls it `name`, where it is something else."""
    if isinstance(given, np.ndarray):
        given = given.tolist()
    no_list = isinstance(given, str | bytes | bytearray | memoryview | Mapping | Set)
    if no_list or not isinstance(given, Iterable):
        advice = ": decode it first" if isinstance(given, bytes | bytearray | memoryview) else ""
        raise InputError(f"{name} is {shown(given)}; {expected} was expected{advice}")
    tokens = list(given)
    odd = [token for token in tokens if not is_int(token)]
    if odd and all(isinstance(token, str | Sequence | np.ndarray) for token in tokens):
        raise InputError(
            f"several prompts were given; one was expected, {expected}: generate and stream_many take a list"
        )
    if odd:
        raise InputError(f"{name} holds {shown(odd[0])}; token ids are whole numbers from 0 to {vocab_size - 1}")
    return [int(token) for token in tokens]


def continuations(options: Mapping[str, Any], n: int) -> list[dict[str, Any]]:
    """The options of each of `n` continuations of one prompt: each has a seed of its own, made of the one given."""
    seed = SamplingConfig.of(options).seed
    seed = fresh_seed() if seed is None else seed
    return [{**options, "seed": continuation_seed(seed, number)} for number in range(n)]


def interleaved(
    streams: Iterator[tuple[Key, Stream | Exception]], most: int
) -> Generator[tuple[Key, Chunk | Completion | Exception], None, None]:
    """Reads up to `most` streams in turn, each to its end. Where one ends, the next one joins.

    Args:
        streams: Each with a key. The next one is asked for when there is room. An error stands for one that could not
            be begun.
        most: How many.

    Yields:
        The key with each chunk, and at last with the completion, or with the error that ended the stream.
    """
    live: list[tuple[Key, Stream]] = []
    try:
        while True:
            while len(live) < most and (begun := next(streams, None)) is not None:
                key, stream = begun
                if isinstance(stream, Stream):
                    live.append((key, stream))
                else:
                    yield key, stream
            if not live:
                return
            for key, stream in list(live):
                found: Chunk | Completion | Exception | None
                try:
                    found = next(stream, None) or stream.completion
                except Exception as error:
                    found = error
                assert found is not None
                if not isinstance(found, Chunk):
                    live.remove((key, stream))
                yield key, found
    finally:
        for _, stream in live:
            stream.close()


class StreamMany(Readable[tuple[int, Chunk], list[Completion]]):
    """Yields (place of the prompt, Chunk), in turn for those that are decoded now; returns the completions in order.

    Attributes:
        completions: By place; None of what has not ended.
    """

    def __init__(
        self,
        begin: Open,
        prompts: Sequence[Any],
        options: Mapping[str, Any],
        most: int,
        n: int | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """`begin` makes a stream of one prompt, which takes nothing yet; up to `most` are read at the same time.

        Prompts that begin alike share that prefill. With `n` there are so many of each prompt, which draw by seeds of
        their own. `progress` is told (done, all) when one ends.
        """
        ordered = isinstance(prompts, Sequence) or getattr(prompts, "ndim", 0) > 0  # an array, or a column of a table
        if isinstance(prompts, str) or not ordered or not len(prompts):
            found = "a text" if isinstance(prompts, str) else "none" if ordered else shown(prompts)
            raise InputError(f"several prompts were expected and {found} was given: give a list of at least one")
        super().__init__()
        require(n is None or is_int(n, 1, MAX_CONTINUATIONS), "n", n, f"a whole number from 1 to {MAX_CONTINUATIONS:,}")
        require(progress is None or callable(progress), "progress", progress, "a function of (done, all), or None")
        each, shared = [options] if n is None else continuations(options, n), SharedPrefills()
        self._streams = [begin(prompt, one, shared) for prompt in prompts for one in each]
        self._rest = self._run(most, progress)

    @property
    def completions(self) -> list[Completion | None]:
        """Those that have ended, by the place of their prompt."""
        return [stream.completion for stream in self._streams]

    def _next(self) -> tuple[int, Chunk]:
        return next(self._rest)

    def close(self) -> None:
        """Ends all within one step."""
        self._rest.close()
        for stream in self._streams:
            stream.close()

    def cancel(self) -> None:
        """Ends all within one step, from any thread: whoever reads gets the end, with what was generated so far."""
        for stream in self._streams:
            stream.cancel()

    def _run(
        self, most: int, progress: Callable[[int, int], object] | None
    ) -> Generator[tuple[int, Chunk], None, list[Completion]]:
        done: dict[int, Completion] = {}
        try:
            for place, found in interleaved(iter(enumerate(self._streams)), most):
                if isinstance(found, Chunk):
                    yield place, found
                elif isinstance(found, Completion):
                    done[place] = found
                    if progress is not None:
                        progress(len(done), len(self._streams))
                else:
                    raise found
        finally:
            for stream in self._streams:
                stream.close()
        return [done[place] for place in range(len(self._streams))]

"""Decode several prompts concurrently. Each result equals that of a separate call; results keep their order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, TypeVar

from pastkey.errors import InputError
from pastkey.values import is_collection, is_int, require, require_type, shown

from ..options import require_valid
from ..sampling.random_stream import continuation_seed, fresh_seed
from .batching.shared_prefill import SharedPrefills
from .completion import Chunk, Completion
from .stream import ChunkStream, Readable

_PROMPT = "a text, or a list of token ids"
Key = TypeVar("Key")
Open = Callable[[Any, Mapping[str, Any], SharedPrefills | None], ChunkStream]


def several(prompt: Any) -> bool:
    """Whether `prompt` is a sequence of prompts."""
    dimensions = getattr(prompt, "ndim", None)
    if dimensions is not None:
        return bool(dimensions == 2)
    listed = isinstance(prompt, Sequence) and not isinstance(prompt, str)
    return listed and len(prompt) > 0 and all(hasattr(one, "__len__") for one in prompt)


def token_ids(prompt: Iterable[Any], vocab_size: int, name: str = "prompt") -> list[int]:
    """A prompt as a list of ints. `name`: the argument's.

    Raises InputError for bytes, a mapping, a set, or several prompts, and for other items; TypeError for no iterable.
    """
    if several(prompt):
        raise InputError(
            f"{name} is {shown(prompt)}; it must be one text, or its token ids: give each separately, or all to "
            "generate() or, where the model has it, stream_many()"
        )
    unordered_or_bytes = isinstance(prompt, bytes | bytearray | memoryview | Mapping | Set)
    require(not unordered_or_bytes, name, prompt, _PROMPT)
    require_type(isinstance(prompt, Iterable) and getattr(prompt, "ndim", 1) > 0, name, prompt, _PROMPT)
    tokens = list(prompt)
    for token in tokens:
        if not is_int(token):
            raise InputError(f"the {name} holds {shown(token)}; token ids are whole numbers from 0 to {vocab_size - 1}")
    return [int(token) for token in tokens]


def continuations(options: Mapping[str, Any], n: int) -> list[dict[str, Any]]:
    """The options of each of `n` completions of one prompt. Each has its own seed, derived from the given one."""
    seed = fresh_seed() if options.get("seed") is None else options["seed"]
    return [{**options, "seed": continuation_seed(seed, number)} for number in range(n)]


def interleaved(
    streams: Iterator[tuple[Key, ChunkStream | Exception]], most: int
) -> Generator[tuple[Key, Chunk | Completion | Exception], None, None]:
    """Reads up to `most` streams in turn. When one ends, the next one joins.

    Args:
        streams: Pairs of a key and a stream, read lazily. An exception instead of a stream is passed on.
        most: The number of concurrent streams.

    Yields:
        The key with each chunk, then with the completion or with the exception that ended the stream.
    """
    live: list[tuple[Key, ChunkStream]] = []
    try:
        while True:
            while len(live) < most and (begun := next(streams, None)) is not None:
                key, stream = begun
                if isinstance(stream, Exception):
                    yield key, stream
                else:
                    live.append((key, stream))
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
    """Yields (index of the prompt, Chunk), in turn for the running prompts; returns the completions in order."""

    def __init__(
        self,
        read: Callable[[Any], Any],
        begin: Open,
        prompts: Sequence[Any],
        options: Mapping[str, Any],
        most: int,
        n: int | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Opens each stream with `begin` when it is due, and the first one now.

        Before, `read` gives each prompt its ids, and raises for a wrong one. Reads up to `most` streams concurrently.
        Prompts with the same beginning share its prefill. `n` gives each prompt that many completions, each with its
        own seed. Calls `progress(done, all)` when a stream ends.
        """
        super().__init__()
        ordered = is_collection(prompts) and not isinstance(prompts, Set)
        require(ordered and len(prompts) > 0, "prompts", prompts, "a list of at least one prompt")
        require_valid({"n": n})
        self._each = [options] if n is None else continuations(options, n)
        self._begin, self._prompts = begin, [read(prompt) for prompt in prompts]
        self._shared = SharedPrefills((prompt.ids for prompt in self._prompts), len(self._each))
        self._count = len(prompts) * len(self._each)
        self._done: dict[int, Completion] = {}
        self._streams = {0: self._open(0)}  # those that are open; a wrong option is told at once
        self._closed = self._cancelled = False
        self._rest = self._run(most, progress)

    @property
    def completions(self) -> list[Completion | None]:
        """The completions by index of the prompt; None while a stream runs."""
        ended = {place: stream.completion for place, stream in list(self._streams.items())}
        return [self._done.get(place) or ended.get(place) for place in range(self._count)]

    def _next(self) -> tuple[int, Chunk]:
        return next(self._rest)

    def close(self) -> None:
        """Ends all streams within one step. Never waits."""
        self._closed = True
        for stream in list(self._streams.values()):
            stream.close()
        self._shared.clear()
        if self._reading.acquire(blocking=False):  # else another thread is inside, and comes to the end now
            try:
                self._rest.close()
            finally:
                self._reading.release()

    def cancel(self) -> None:
        """Ends all streams within one step, from any thread. Readers get the end, with the tokens decoded so far."""
        self._cancelled = True
        for stream in list(self._streams.values()):
            stream.cancel()

    def _open(self, place: int) -> ChunkStream:
        prompt, number = divmod(place, len(self._each))
        return self._begin(self._prompts[prompt], self._each[number], self._shared)

    def _opened(self) -> Iterator[tuple[int, ChunkStream]]:
        """The streams by index, each opened when it is due."""
        for place in range(self._count):
            if self._closed:
                return
            if place not in self._streams:
                self._streams[place] = self._open(place)
            if self._cancelled:
                self._streams[place].cancel()
            yield place, self._streams[place]

    def _run(
        self, most: int, progress: Callable[[int, int], object] | None
    ) -> Generator[tuple[int, Chunk], None, list[Completion]]:
        try:
            for place, found in interleaved(self._opened(), most):
                if isinstance(found, Chunk):
                    yield place, found
                elif isinstance(found, Completion):
                    self._done[place] = found
                    del self._streams[place]
                    if progress is not None:
                        progress(len(self._done), self._count)
                else:
                    raise found
        finally:
            for stream in list(self._streams.values()):
                stream.close()
        return [self._done[place] for place in sorted(self._done)]

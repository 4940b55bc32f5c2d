"""Streams that are decoded together, each to its end: where one ends, the next one joins."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import TypeVar

from pastkey.errors import MissingExtraError, PastkeyError, UntrustedBundleError, first_line

from ..decoding.completion import Chunk, Completion
from ..decoding.many import interleaved
from ..decoding.stream import Stream

Key = TypeVar("Key")


def told(error: Exception) -> str:
    """An error as the row's own sentence. Raises it where it is everybody's: no memory, no package, no process."""
    if isinstance(error, MissingExtraError | MemoryError | UntrustedBundleError):
        raise error
    return str(error) if isinstance(error, PastkeyError) else f"{type(error).__name__}: {first_line(error)}"


def finished(
    streams: Iterator[tuple[Key, Stream | Exception]], most: int
) -> Generator[tuple[Key, Completion | str], None, None]:
    """Reads up to `most` streams at the same time.

    Args:
        streams: Each with a key. The next one is asked for when there is room. An error stands for one that could not
            be begun.
        most: How many.

    Yields:
        The key, and the completion or the sentence of what was wrong, in the order in which they end.
    """
    with contextlib.closing(interleaved(streams, most)) as found:
        for key, one in found:
            if not isinstance(one, Chunk):
                yield key, one if isinstance(one, Completion) else told(one)

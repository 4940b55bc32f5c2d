"""What a process says: no object is made of it but these, those of the runtime and plain JSON, each by its type.

A hostile bundle may have taken the process over, so that it may say anything. The first reply that is none of these, or
longer than was asked for, ends it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from pastkey.typed import Natural

from ..decoding.completion import Chunk, Completion

MOST_JSON: Final = 16_000_000  # bytes of a reply, where nothing else is said


@dataclass(frozen=True)
class Failure:
    """An error: the name of a class of pastkey.errors, or "memory" or "fault"."""

    kind: str
    sentence: str


@dataclass(frozen=True)
class Step:
    """A stream's next piece, or at its end a Completion without what the pieces told. Neither, where it was closed."""

    prompt_tokens: Natural = 0
    piece: Chunk | None = None
    whole: Completion | None = None


@dataclass(frozen=True)
class Format:
    """A chat template: its source, and the variables that it reads."""

    source: str
    variables: tuple[str, ...]


@dataclass(frozen=True)
class Reply:
    """One reply: what was found, or a failure."""

    id: Natural
    value: Any = None
    failure: Failure | None = None

"""The limits of an untrusted bundle's process: the requested ones, and those in force."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pastkey.errors import InputError
from pastkey.files.memory import shown_bytes
from pastkey.typed import Between
from pastkey.values import is_int, is_number, shown

SECONDS = 120.0
MEMORY, MEMORY_PER_BYTE = 2_000_000_000, 3  # bytes in addition to the libraries, and for each byte of the bundle
LEAST_MEMORY = 16_000_000


@dataclass(frozen=True)
class Limits:
    """The limits of an untrusted bundle.

    Attributes:
        memory: Bytes in addition to those of Python and its libraries, without weights that are mapped from their
            file. None means 2 GB and three times the size of the bundle's files, within the available memory.
        seconds: Time to load, and for each answer: the next token, of which the first includes the whole prompt; the
            score of a text; a rendering of a conversation.
    """

    memory: int | None = None
    seconds: float = SECONDS

    def __post_init__(self) -> None:
        if self.memory is not None and not is_int(self.memory, LEAST_MEMORY, 2**62):
            raise InputError(f"memory is {shown(self.memory)}; bytes from {LEAST_MEMORY} were expected, or None")
        if not is_number(self.seconds) or not 0 < self.seconds <= 1e6:
            raise InputError(f"seconds is {shown(self.seconds)}; a number above 0 and at most 1000000 was expected")


@dataclass(frozen=True)
class LimitsInForce:
    """The limits in force in a child process. `str` says them in words.

    Attributes:
        seconds: Time to load, and for each answer.
        memory: Bytes in addition to those of Python and its libraries, or None if the system cannot limit it.
        landlock: The ABI of landlock, which allows reading only the bundle and the libraries, and denies writing files
            and starting programs; from 4 on also TCP. 0 without landlock: then files are accessible.
        missing: The limits that this system lacks, in words.
    """

    seconds: float
    memory: Annotated[int, Between(0, 2**63 - 1)] | None
    landlock: Annotated[int, Between(0, 1000)]
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.seconds:g} s for an answer"]
        if self.memory is not None:
            parts.append(f"{shown_bytes(self.memory)} of memory")
        if self.landlock:
            parts.append(f"no files but its own and the libraries (landlock ABI {self.landlock})")
        lacking = f"; not in force on this system: {', '.join(self.missing)}" if self.missing else ""
        return f"limits in force: {', '.join(parts)}{lacking}"


def default_memory(files: int, available: int | None) -> int:
    """Bytes for a bundle whose files have so many bytes, where so many are available."""
    wanted = MEMORY + MEMORY_PER_BYTE * files
    return wanted if available is None else max(LEAST_MEMORY, min(wanted, available))

"""An error as the process of an untrusted bundle tells it."""

from __future__ import annotations

from typing import Final

from pastkey.errors import IntegrityError, PastkeyError, first_line

# In what an error says where memory has run out.
_NO_MEMORY: Final = ("bad_alloc", "bad allocation", "allocate memory", "out of memory", "can't start new thread")


def failure_of(error: BaseException) -> dict[str, str]:
    """An error as a Failure: a sentence by its class, or what the memory or a fault says."""
    words, name = str(error).encode("utf-8", "replace").decode(), type(error).__name__
    # Other sentences of pastkey quote what a user wrote.
    quotes = isinstance(error, PastkeyError) and not isinstance(error, IntegrityError)
    if isinstance(error, MemoryError) or (not quotes and any(sign in words for sign in _NO_MEMORY)):
        return {"kind": "memory", "sentence": first_line(Exception(words or name))}
    if isinstance(error, PastkeyError):
        return {"kind": name, "sentence": words}
    return {"kind": "fault", "sentence": f"{name}: {first_line(Exception(words or name))}"}

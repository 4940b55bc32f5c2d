"""Messages between a model and its process: the length of a JSON object (4 bytes, little-endian), and the object.

Standard library only: the process reads its first message before any library has started a thread.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Final

from pastkey.errors import IntegrityError, PastkeyError, first_line

HEADER: Final = struct.Struct("<I")
# In what an error says where memory has run out.
_NO_MEMORY: Final = ("bad_alloc", "bad allocation", "allocate memory", "out of memory", "can't start new thread")


class MalformedError(Exception):
    """The bytes that came are not a message."""


def message(content: Mapping[str, Any], *, ascii_only: bool = False) -> bytes:
    """One message.

    Half of a surrogate pair passes with `ascii_only`, and is a UnicodeEncodeError without. What JSON does not write is
    a TypeError, ValueError or RecursionError.
    """
    text = json.dumps(content, ensure_ascii=ascii_only).encode()
    if len(text) >= 1 << 32:
        raise ValueError("4 GB and more")
    return HEADER.pack(len(text)) + text


def write_frame(stream: BinaryIO, sent: bytes) -> None:
    """Writes what `message` made."""
    stream.write(sent)
    stream.flush()


def read_frame(stream: BinaryIO, parse: Callable[[bytes], Any], most: Callable[[], int]) -> dict[str, Any] | None:
    """Reads one message, or None at the end.

    Args:
        stream: Where it comes from.
        parse: Reads JSON.
        most: How many bytes of JSON are accepted; asked when a message comes.

    Raises:
        MalformedError: It is longer, or cut short, or no JSON object.
    """
    header = stream.read(HEADER.size)
    if not header:
        return None
    if len(header) < HEADER.size:
        raise MalformedError("a message that was cut short")
    (length,) = HEADER.unpack(header)
    if length > most():
        raise MalformedError(f"a message of {length:,} bytes")
    text = stream.read(length)
    if len(text) < length:
        raise MalformedError("a message that was cut short")
    try:
        content = parse(text)
    except Exception as error:
        raise MalformedError(f"{error}") from None
    if not isinstance(content, dict):
        raise MalformedError("a message that is not an object")
    return content


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

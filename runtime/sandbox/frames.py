"""Messages between a model and its process: JSON with its length, and behind it the bytes of an array.

    length of the JSON      4 bytes, little-endian
    length of the array     8 bytes
    JSON                    an object with the "id" of the call
    array                   little-endian float32

Standard library only: the process reads its first message before any library has started a thread.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

HEADER = struct.Struct("<IQ")
_PIECE = 1 << 20


class MalformedError(Exception):
    """What came is no message."""


def message(content: Mapping[str, Any], array: bytes | memoryview = b"", *, ascii_only: bool = False) -> bytes:
    """One message, but for the array behind it.

    Half of a surrogate pair passes with `ascii_only`, and is a UnicodeEncodeError without. What JSON does not write is
    a TypeError, ValueError or RecursionError.
    """
    text = json.dumps(content, ensure_ascii=ascii_only).encode()
    return HEADER.pack(len(text), array.nbytes if isinstance(array, memoryview) else len(array)) + text


def write_frame(stream: BinaryIO, head: bytes, array: bytes | memoryview = b"") -> None:
    """Writes what `message` made, and the array behind it."""
    stream.write(head)
    stream.write(array)
    stream.flush()


def read_frame(
    stream: BinaryIO,
    parse: Callable[[bytes], Any],
    most_json: Callable[[], int],
    most_array: Callable[[Mapping[str, Any]], int],
) -> tuple[dict[str, Any], bytearray] | None:
    """Reads one message, or None where there are no more.

    Args:
        stream: Where it comes from.
        parse: Reads JSON.
        most_json: Tells how many bytes of JSON are taken.
        most_array: Tells how many bytes of an array are taken behind this JSON.

    Raises:
        MalformedError: It is longer, or cut short, or no JSON object.
    """
    header = stream.read(HEADER.size)
    if not header:
        return None
    if len(header) < HEADER.size:
        raise MalformedError("a message that was cut short")
    length, size = HEADER.unpack(header)
    if length > most_json():
        raise MalformedError(f"a message of {length:,} bytes")
    text = stream.read(length)
    if len(text) < length:
        raise MalformedError("a message that was cut short")
    try:
        content = parse(text)
    except Exception as error:
        raise MalformedError(f"{error}") from None
    if not isinstance(content, dict):
        raise MalformedError("a message that is no object")
    if size > most_array(content):
        raise MalformedError(f"an array of {size:,} bytes")
    array = bytearray()
    while len(array) < size:  # memory is taken for what comes, and not for what is promised
        piece = stream.read(min(_PIECE, size - len(array)))
        if not piece:
            raise MalformedError("an array that was cut short")
        array += piece
    return content, array

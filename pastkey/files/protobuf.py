"""Parses protobuf's wire format: the fields of a message, without the package and without a schema.

https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

Bytes = bytes | mmap.mmap

# Wire types. The other two, 3 and 4, are those of the obsolete groups.
VARINT, BYTES = 0, 2
_SIZES = {1: 8, 5: 4}  # bytes of the fixed-size types


class DamagedError(ValueError):
    """Bytes that are not protobuf, or not the expected message. A truncated message may also raise IndexError."""


def fields(content: Bytes, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields the number, wire type, start and end of each field of a message."""
    while position < end:
        tag, start = content[position], position + 1
        if tag > 0x7F:  # most tags have one byte
            tag, start = varint(content, position)
        if tag > 0xFFFFFFFF:  # some readers would cut it to 32 bits
            raise DamagedError("a field of an impossible number")
        wire = tag & 7
        if wire == BYTES:
            size, start = content[start], start + 1
            if size > 0x7F:
                size, start = varint(content, start - 1)
            position = start + size
        elif wire == VARINT:
            position = varint(content, start)[1]
        elif wire in _SIZES:
            position = start + _SIZES[wire]
        else:
            raise DamagedError(f"a field of the unknown wire type {wire}")
        if position > end:
            raise DamagedError("a field reaches beyond its message")
        yield tag >> 3, wire, start, position


def varint(content: Bytes, position: int) -> tuple[int, int]:
    """Returns a varint (seven bits per byte, the lowest first) and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise DamagedError("a number of more than ten bytes")

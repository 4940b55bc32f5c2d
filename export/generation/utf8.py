"""Bytes to whole characters, as nodes: invalid UTF-8 becomes U+FFFD, and an unfinished last character is dropped.

The rule is that of `bytes.decode("utf-8", "replace")`: the longest beginning of an interrupted character, and each byte
that cannot begin one, becomes one U+FFFD (The Unicode Standard 15.0, section 3.9, substitution of maximal subparts).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .nodes import Nodes

REPLACED, DROPPED = 256, 257  # codes instead of a byte: U+FFFD, and nothing
_LONGEST = 4


def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each byte: the length of the character that it begins (0: none), and the smallest and largest second byte."""
    length, least, most = np.zeros(256, np.int64), np.full(256, 0x80), np.full(256, 0xBF)
    length[:0x80], length[0xC2:0xE0], length[0xE0:0xF0], length[0xF0:0xF5] = 1, 2, 3, 4
    least[0xE0], most[0xED], least[0xF0], most[0xF4] = 0xA0, 0x9F, 0x90, 0x8F  # overlong forms, surrogates, the end
    return length, least, most


def whole_characters(n: Nodes, stream: ir.Value) -> ir.Value:
    """Maps bytes (N,) int64, 0 to 255, to (N,) int64: the byte, REPLACED or DROPPED."""
    length, least, most = (n.gathered(table, stream) for table in _tables())
    # The next bytes of each, -1 past the end.
    padded = n.add("Concat", stream, n.number([-1] * (_LONGEST - 1)), axis=0)
    count = n.add("Shape", stream)
    ahead = [n.add("Slice", padded, n.number([i]), n.add("Add", count, n.number([i]))) for i in range(1, _LONGEST)]
    zero, one = n.number(0), n.number(1)
    begins = n.add("Greater", length, zero)
    follows = n.add("And", n.between(ahead[0], least, most), begins)
    span = n.as_int(begins)  # bytes that belong to the character so far
    for place, byte in enumerate(ahead):
        if place:
            follows = n.add("And", follows, n.between(byte, n.number(0x80), n.number(0xBF)))
        follows = n.add("And", follows, n.add("Greater", length, n.number(place + 1)))
        span = n.add("Add", span, n.as_int(follows))
    whole = n.add("And", begins, n.add("Equal", span, length))
    # How far earlier spans reach: a byte within one belongs to it.
    places = n.add("Range", zero, n.scalar(count), one)
    reach = n.add("Add", places, span)
    inside = n.number([False], np.bool_)
    kept_inside = inside
    for back in range(1, _LONGEST):
        before, was_whole = n.shifted(reach, back, 0), n.shifted(n.as_int(whole), back, 0)
        covered = n.add("And", n.add("Greater", before, places), n.add("Not", begins))
        inside = n.add("Or", inside, covered)
        kept_inside = n.add("Or", kept_inside, n.add("And", covered, n.add("Greater", was_whole, zero)))
    unfinished = n.add("And", n.add("And", begins, n.add("Less", span, length)), n.add("Equal", reach, count))
    kept = n.add("Or", whole, kept_inside)
    dropped = n.add("Or", inside, unfinished)
    return n.add("Where", kept, stream, n.add("Where", dropped, n.number(DROPPED), n.number(REPLACED)))

"""The fields of a message by the wire format alone."""

from __future__ import annotations

import pytest

from pastkey.files.protobuf import BYTES, VARINT, DamagedError, fields, varint


def test_each_field_is_told_with_its_place():
    content = bytes([0x08, 0x96, 0x01, 0x12, 0x02]) + b"ab" + bytes([0x1D, 1, 0, 0, 0])
    found = list(fields(content, 0, len(content)))
    assert found == [(1, VARINT, 1, 3), (2, BYTES, 5, 7), (3, 5, 8, 12)]
    assert varint(content, 1) == (150, 3)
    assert content[5:7] == b"ab"


@pytest.mark.parametrize(
    "content", [bytes([0x12, 0x05, 0x61]), bytes([0x0B]), bytes([0x08, *[0x80] * 10, 0x01]), bytes([0x1D, 1, 0])]
)
def test_what_is_no_message_is_damaged(content):
    with pytest.raises(DamagedError):
        list(fields(content, 0, len(content)))


def test_a_number_that_is_cut_short_ends_the_bytes():
    with pytest.raises(IndexError):
        varint(bytes([0x80]), 0)

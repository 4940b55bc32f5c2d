from __future__ import annotations

import io
import json
from typing import Any

import pytest

from pastkey.runtime.sandbox.frames import HEADER, MalformedError, message, read_frame, write_frame


def sent(content: dict[str, Any], array: bytes | memoryview = b"", **more: bool) -> bytes:
    stream = io.BytesIO()
    write_frame(stream, message(content, array, **more), array)
    return stream.getvalue()


def read(content: bytes, most_json: int = 100, most_array: int = 10) -> Any:
    return read_frame(io.BytesIO(content), json.loads, lambda: most_json, lambda _: most_array)


def test_a_message_comes_as_it_was_sent() -> None:
    assert read(sent({"a": "é日"}, b"bytes")) == ({"a": "é日"}, b"bytes")
    assert read(sent({"a": 1}, memoryview(b"bytes"))) == ({"a": 1}, b"bytes")
    assert read(sent({"a": "\ud800"}, ascii_only=True)) == ({"a": "\ud800"}, b"")
    with pytest.raises(UnicodeEncodeError):
        sent({"a": "\ud800"})
    stream = io.BytesIO(sent({"a": 1}) + sent({"b": 2}, b"x"))
    found: list[Any] = [read_frame(stream, json.loads, lambda: 100, lambda _: 10) for _ in range(3)]
    assert found == [({"a": 1}, b""), ({"b": 2}, b"x"), None]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"hello", "a message that was cut short"),
        (sent({"a": 1})[:-1], "a message that was cut short"),
        (sent({"a": 1}, b"12345")[:-1], "an array that was cut short"),
        (HEADER.pack(101, 0), "a message of 101 bytes"),
        (HEADER.pack(2**32 - 1, 2**64 - 1), "a message of 4,294,967,295 bytes"),
        (HEADER.pack(2, 2**64 - 1) + b"{}", "an array of 18,446,744,073,709,551,615 bytes"),
        (HEADER.pack(4, 0) + b"null", "a message that is no object"),
        (HEADER.pack(4, 0) + b"\xff\xff\xff\xff", "."),
        (HEADER.pack(4, 0) + b"{{{{", "."),
    ],
)
def test_what_is_none(content: bytes, told: str) -> None:
    with pytest.raises(MalformedError, match=told):
        read(content)

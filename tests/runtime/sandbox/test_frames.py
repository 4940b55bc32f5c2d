from __future__ import annotations

import io
import json
from typing import Any

import pytest

from pastkey.errors import InputError, IntegrityError
from pastkey.runtime.sandbox.frames import HEADER, MalformedError, failure_of, message, read_frame, write_frame


def sent(content: dict[str, Any], **more: bool) -> bytes:
    stream = io.BytesIO()
    write_frame(stream, message(content, **more))
    return stream.getvalue()


def test_a_message_comes_as_it_was_sent():
    stream = io.BytesIO(sent({"a": "é日"}) + sent({"a": "\ud800"}, ascii_only=True))
    found = [read_frame(stream, json.loads, lambda: 100) for _ in range(3)]
    assert found == [{"a": "é日"}, {"a": "\ud800"}, None]
    with pytest.raises(UnicodeEncodeError):
        sent({"a": "\ud800"})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"hel", "a message that was cut short"),
        (sent({"a": 1})[:-1], "a message that was cut short"),
        (HEADER.pack(101), "a message of 101 bytes"),
        (HEADER.pack(4) + b"null", "a message that is not an object"),
        (HEADER.pack(4) + b"\xff\xff\xff\xff", "."),
        (HEADER.pack(4) + b"{{{{", "."),
    ],
)
def test_anything_else_is_malformed(content, told):
    with pytest.raises(MalformedError, match=told):
        read_frame(io.BytesIO(content), json.loads, lambda: 100)


def test_errors_by_their_kind():
    assert failure_of(InputError("odd \ud800")) == {"kind": "InputError", "sentence": "odd ?"}
    assert failure_of(InputError("no token covers 'out of memory'"))["kind"] == "InputError"
    assert failure_of(MemoryError()) == {"kind": "memory", "sentence": "MemoryError"}
    assert failure_of(IntegrityError("cannot load: std::bad_alloc"))["kind"] == "memory"
    assert failure_of(RuntimeError("can't start new thread"))["kind"] == "memory"
    assert failure_of(KeyError("x")) == {"kind": "fault", "sentence": "KeyError: 'x'"}

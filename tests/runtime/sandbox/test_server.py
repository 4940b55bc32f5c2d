"""What the process answers, asked here over two pipes."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pastkey.bundle import Bundle
from pastkey.runtime.sandbox.frames import message, read_frame
from pastkey.runtime.sandbox.protocol import Text
from pastkey.runtime.sandbox.server import Server


def answers(server: Server, *asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    target = io.BytesIO()
    server._target = target
    for number, one in enumerate(asked, 1):
        server._answer({"id": number, **one}, bytearray())
    target.seek(0)
    found = []
    while (read := read_frame(target, json.loads, lambda: 10**9, lambda _: 10**9)) is not None:
        found.append(read[0] | ({"bytes": len(read[1])} if read[1] else {}))
    return found


@pytest.fixture(scope="module")
def server(talking_bundle: Bundle) -> Server:
    made = Server(talking_bundle.path, io.BytesIO(), io.BytesIO())
    settings = {"threads": 1, "max_memory": None, "prefix_bytes": 0, "max_batch": 2}
    (found,) = answers(made, {"what": "load", "given": settings})
    assert found["value"]["tokenizer"] is True
    return made


def test_each_call_has_one_answer(server: Server) -> None:
    found = answers(
        server,
        {"what": "encode", "given": {"text": "abc", "add_special_tokens": True}},
        {"what": "logits", "given": {"ids": [1, 2]}},
        {"what": "stream", "given": {"stream": 5, "text": "ab", "options": {"max_new_tokens": 1}}},
        {"what": "next", "given": {"stream": 5}},
        {"what": "next", "given": {"stream": 5}},
        {"what": "next", "given": {"stream": 5}},
        {"what": "close", "given": {"stream": 5}},
        {"what": "nothing", "given": {}},
        {"what": "encode", "given": {"text": "", "add_special_tokens": True}},
    )
    assert [one["id"] for one in found] == list(range(1, 10))
    assert found[0]["value"] == {"ids": [0, 1, 2]}
    assert (found[1]["value"], found[1]["bytes"]) == ({"rows": 2, "columns": 37}, 2 * 37 * 4)
    assert found[3]["value"]["piece"]["ids"]
    assert found[4]["value"]["whole"]["new_tokens"] == 1
    assert [one["failure"]["kind"] for one in (found[5], found[7], found[8])] == ["fault", "fault", "InputError"]
    assert found[6]["value"] == {"piece": None, "whole": None}


def test_what_needs_no_answer_has_none(server: Server) -> None:
    server._target = target = io.BytesIO()
    server._answer({"id": 0, "what": "cancel", "given": {"stream": 99}}, bytearray())
    server._answer({"id": 0, "what": "nonsense", "given": {}}, bytearray())
    assert target.getvalue() == b""


def test_what_json_cannot_hold_is_a_sentence(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "do_decode", lambda self, **_: Text("\ud800"))
    (found,) = answers(server, {"what": "decode", "given": {}})
    assert found["failure"] == {
        "kind": "InputError",
        "sentence": "the text holds half of a surrogate pair, which is no character",
    }
    monkeypatch.setattr(Server, "do_decode", lambda self, **_: Text(object()))  # type: ignore[arg-type]
    (found,) = answers(server, {"what": "decode", "given": {}})
    assert found["failure"]["kind"] == "fault"


def test_a_command_is_run_on_the_bundle_and_no_other(server: Server, tmp_path: Path) -> None:
    given = {
        "json": True,
        "bundle": str(tmp_path),
        "provider": "cpu",
        "provider_options": None,
        "session_options": None,
    }
    given |= {"threads": 1, "allow_fallback": False, "untrusted": False, "limits": None}
    (found,) = answers(server, {"what": "command", "given": {"name": "inspect", "arguments": given}})
    assert found["value"]["status"] == 0
    assert json.loads(found["value"]["out"])["manifest"]["source"] == "tiny"
    assert message({"a": 1})

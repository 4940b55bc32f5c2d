"""What the process answers, asked here over two pipes."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import pytest

from pastkey.runtime.commands.untrusted_rows import answer_here
from pastkey.runtime.loading import load
from pastkey.runtime.sandbox.connection import name_of
from pastkey.runtime.sandbox.frames import read_frame
from pastkey.runtime.sandbox.server import Server, function_of


def answers(server: Server, *asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    target = io.BytesIO()
    server._target = target
    for number, one in enumerate(asked, 1):
        server._answer({"id": number, **one})
    target.seek(0)
    found = []
    while (read := read_frame(target, json.loads, lambda: 10**9)) is not None:
        found.append(read)
    return found


@pytest.fixture(scope="module")
def server(talking_bundle):
    made = Server(talking_bundle.path, io.BytesIO(), io.BytesIO())
    settings = {"load": name_of(load), "threads": 1, "max_memory": None, "prefix_bytes": 0, "max_batch": 2}
    (found,) = answers(made, {"what": "load", "given": settings})
    assert found["value"]["source"] == "tiny"
    return made


def test_each_call_has_one_answer(server):
    found = answers(
        server,
        {"what": "score", "given": {"text": "abc"}},
        {"what": "stream", "given": {"number": 5, "text": "ab", "options": {"max_new_tokens": 1}}},
        {"what": "next", "given": {"number": 5}},
        {"what": "next", "given": {"number": 5}},
        {"what": "nothing", "given": {}},
        {"what": "score", "given": {"text": ""}},
    )
    assert [one["id"] for one in found] == list(range(1, 7))
    assert found[0]["value"]["ids"] == [0, 1, 2]
    assert found[1]["value"]["piece"]["ids"]
    assert (found[2]["value"]["whole"]["finish_reason"], found[2]["value"]["prompt_tokens"]) == ("length", 2)
    assert found[3]["value"] == {"prompt_tokens": 0, "piece": None, "whole": None}
    assert [one["failure"]["kind"] for one in found[4:]] == ["fault", "InputError"]


def test_what_needs_no_answer_has_none(server):
    server._target = target = io.BytesIO()
    server._answer({"id": 0, "what": "cancel", "given": {"number": 99}})
    server._answer({"id": 0, "what": "nonsense", "given": {}})
    assert target.getvalue() == b""


def test_what_json_cannot_hold_is_a_sentence(server, monkeypatch):
    monkeypatch.setattr(Server, "do_render", lambda self, **_: "\ud800")
    (found,) = answers(server, {"what": "render", "given": {}})
    assert found["failure"] == {
        "kind": "InputError",
        "sentence": "the text holds half of a surrogate pair, which is not a character",
    }
    monkeypatch.setattr(Server, "do_render", lambda self, **_: object())
    (found,) = answers(server, {"what": "render", "given": {}})
    assert found["failure"]["kind"] == "fault"


def test_a_function_is_found_by_its_name():
    assert function_of(name_of(answer_here)) is answer_here

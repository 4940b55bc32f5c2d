"""Messages and the file that holds them; tools as JSON schemas."""

from __future__ import annotations

import json
import typing
from typing import Any

import pytest

from pastkey.errors import InputError
from pastkey.runtime.text import messages
from pastkey.runtime.text.messages import checked_content, read_messages, save_messages, text_of
from pastkey.runtime.text.tools import tool_name, tool_schemas

TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "é"},
    {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
]
CALL = {"id": "call00000", "type": "function", "function": {"name": "weather", "arguments": {}}}
BROKEN = [{"role": "user", "content": {1}}]


def test_what_is_saved_is_read(tmp_path):
    talk: list[dict[str, Any]] = [*TALK, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    save_messages(tmp_path / "talk", talk)
    assert read_messages(tmp_path / "talk") == talk


def test_only_a_conversation_is_replaced(tmp_path):
    file = tmp_path / "notes"
    file.write_text("my notes")
    for place, words in ((file, "is not a saved conversation: choose another name"), (tmp_path, "is a folder; the")):
        with pytest.raises(InputError, match=words):
            save_messages(place, TALK)
    assert file.read_text() == "my notes"
    file.write_text("")
    for talk in (TALK, TALK[:1]):
        save_messages(file, talk)
        assert read_messages(file) == talk


def test_what_json_does_not_know_is_told(tmp_path):
    for there in (False, True):
        with pytest.raises(InputError, match=r"cannot be saved in .*talk: .*set"):
            save_messages(tmp_path / "talk", BROKEN)
        assert [*tmp_path.iterdir()] == [tmp_path / "talk"] * there
        save_messages(tmp_path / "talk", TALK)
    assert read_messages(tmp_path / "talk") == TALK


def said(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "", **fields}]}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"message": []}, 'is not a saved conversation: it has no list of "messages"'),
        ({"messages": ["a"]}, "message 1 of .* is 'a'; an object with \"role\""),
        (said(content=3), "message 1 of .* is 3; a text was expected"),
        (said(content=[{"type": "image", "text": "a"}]), "this model reads text"),
        (said(content=[{"type": "text"}]), "this model reads text"),
        (said(tool_calls=[{"function": {}}]), "has the tool calls"),
        (said(tool_calls=5), "tool calls 5; a list"),
    ],
)
def test_what_is_no_conversation_is_told(tmp_path, found, words):
    (tmp_path / "talk").write_text(json.dumps(found))
    with pytest.raises(InputError, match=words):
        read_messages(tmp_path / "talk")
    with pytest.raises(InputError, match="is a folder; a saved conversation was expected"):
        read_messages(tmp_path)


def test_parts_are_lines_of_one_text():
    parts: messages.Content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert text_of(checked_content("x", parts)) == "a\nb"
    made = messages.message("user", parts, name="c")
    assert made == {"role": "user", "content": parts, "name": "c"}
    assert made["content"][0] is not parts[0]


# --- tools ----------------------------------------------------------------------------------------------------------
def test_schemas_stay_as_they_are_and_without_parameters_take_none():
    takes: dict[str, Any] = {"type": "object", "properties": {"x": {}}}
    none = takes | {"properties": {}}
    schemas: list[dict[str, Any]] = [
        {"type": "function", "function": {"name": "a", "parameters": takes}},
        {"name": "b", "x": 1, "parameters": takes},
    ]
    assert tool_schemas(schemas) == schemas
    assert [tool_name(schema) for schema in schemas] == ["a", "b"]
    short: list[dict[str, Any]] = [{"type": "function", "function": {"name": "a"}}, {"name": "b"}]
    assert tool_schemas(short) == [
        {"type": "function", "function": {"name": "a", "parameters": none}},
        {"name": "b", "parameters": none},
    ]
    assert short[1] == {"name": "b"}


def no_hint(x) -> None:
    pass


def odd_hint(x: bytes) -> None:
    pass


def many(*x: int) -> None:
    pass


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        (3, "a tool is 3; a JSON schema such as .* or a function was expected"),
        ({"type": "function"}, "a tool is .*; a JSON schema"),
        (no_hint, "the tool no_hint cannot be described: its argument x has no type hint"),
        (odd_hint, "the tool odd_hint .* argument x .*bytes"),
        (many, "the tool many .* type hint"),
    ],
)
def test_what_is_no_tool_is_told(tool, words):
    with pytest.raises(InputError, match=words):
        tool_schemas([tool])


def test_a_list_or_dict_of_typing_may_say_nothing_of_what_it_holds():
    def tool(a: typing.List, b: typing.Dict) -> None:  # type: ignore[type-arg]  # noqa: UP006
        pass

    found = tool_schemas([tool])[0]["function"]["parameters"]["properties"]
    assert found == {"a": {"type": "array"}, "b": {"type": "object"}}

"""Messages and the file that holds them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pastkey.errors import InputError
from pastkey.runtime.text import messages
from pastkey.runtime.text.messages import checked_content, read_messages, save_messages, text_of

TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "é"},
    {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
]
CALL = {"id": "call00000", "type": "function", "function": {"name": "weather", "arguments": {}}}


def test_what_is_saved_is_read(tmp_path):
    talk: list[dict[str, Any]] = [*TALK, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    save_messages(tmp_path / "talk", talk)
    assert read_messages(tmp_path / "talk") == talk


def test_only_a_conversation_is_replaced(tmp_path):
    file = tmp_path / "notes"
    file.write_text("my notes")
    with pytest.raises(InputError, match="is not a saved conversation: choose another name"):
        save_messages(file, TALK)
    assert file.read_text() == "my notes"
    with pytest.raises(InputError, match="is a folder; the name of a file"):
        save_messages(tmp_path, TALK)
    file.write_text("")
    save_messages(file, TALK)
    save_messages(file, TALK[:1])
    assert read_messages(file) == TALK[:1]


def test_what_json_does_not_know_is_told(tmp_path):
    with pytest.raises(InputError, match=r"cannot be saved in .*talk: .*set"):
        save_messages(tmp_path / "talk", [{"role": "user", "content": {1}}])
    assert list(tmp_path.iterdir()) == []
    save_messages(tmp_path / "talk", TALK)
    with pytest.raises(InputError, match=r"cannot be saved in .*talk: .*set"):
        save_messages(tmp_path / "talk", [{"role": "user", "content": {1}}])
    assert read_messages(tmp_path / "talk") == TALK


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"message": []}, 'is not a saved conversation: it has no list of "messages"'),
        ({"messages": ["a"]}, "message 1 of .* is 'a'; an object with \"role\""),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 of .* is 3; a text was expected"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "text": "a"}]}]}, "this model reads text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "this model reads text"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]}, "has the tool calls"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": 5}]}, "tool calls 5; a list"),
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

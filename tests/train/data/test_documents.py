"""Each format's rows, and the sentences for rows of no format."""

from __future__ import annotations

from typing import Any

import pytest

from pastkey.errors import InputError
from pastkey.train.data.documents import Completion, Conversation, document_of

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "content", "texts"),
    [
        ({"text": "a", "id": 3}, "a", ["a"]),
        ({"prompt": "a", "completion": "b"}, Completion("a", "b"), ["ab"]),
        ({"messages": MESSAGES, "text": "x"}, Conversation(MESSAGES), ["a", "b"]),
        ({"messages": MESSAGES, "tools": [{"name": "t"}]}, Conversation(MESSAGES, [{"name": "t"}]), ["a", "b"]),
        ({"messages": None, "prompt": None, "text": "a"}, "a", ["a"]),  # as Parquet fills rows
    ],
)
def test_a_row_becomes_a_document(row, content, texts):
    document = document_of(row, "a.jsonl, line 1")
    assert document.content == content
    assert list(document.texts()) == texts
    assert document.masked == (not isinstance(content, str))


def test_different_documents_have_different_bytes():
    rows: list[dict[str, Any]] = [
        {"text": "ab"},
        {"prompt": "a", "completion": "b"},
        {"prompt": "", "completion": "ab"},
    ]
    rows += [{"messages": MESSAGES}, {"messages": MESSAGES[:1]}, {"messages": MESSAGES, "tools": []}]
    assert len({document_of(row, "").canonical() for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (["a"], r"line 1 is \['a'\]; expected an object such as"),
        ({}, "line 1 has the fields none; expected text, or prompt and completion, or messages"),
        ({"prompt": "a"}, "line 1 has the fields prompt; expected"),
        ({"text": 3}, "line 1: text is 3; it must be a text"),
        ({"text": "\ud800"}, "it must be a text"),
        ({"prompt": "a", "completion": MESSAGES}, "a conversation goes into the field messages"),
        ({"messages": []}, r"messages is \[\]; it must be a list of messages"),
        ({"messages": "hi"}, "messages is 'hi'; it must be a list"),
        ({"messages": ["hi"]}, "a message is 'hi'; each must be an object with role and content"),
        ({"messages": [{"from": "human", "value": "hi"}]}, "each must be an object with role and content"),
        ({"messages": [{"role": "user", "text": "hi"}]}, "each must be an object with role and content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "each must be an object with role and content"),
        ({"messages": MESSAGES, "tools": ["t"]}, "it must be a list of JSON schemas"),
    ],
)
def test_a_row_of_no_format_is_refused(row, sentence):
    with pytest.raises(InputError, match=sentence):
        document_of(row, "a.jsonl, line 1")

"""Rows as they are read, what each asks for, what is wrong with one that cannot be answered, and its line of output."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pastkey.errors import InputError, MissingFileError
from pastkey.runtime import Completion, TokenLogprob
from pastkey.runtime.bulk import rows as module
from pastkey.runtime.bulk.rows import (
    FIELDS,
    Row,
    RowRequest,
    answer_of,
    answered_line,
    error_of,
    parse_request,
    read_rows,
    seed_of,
)

HI = [{"role": "user", "content": "Hi"}]
ANSWER = {"text": "é", "finish_reason": "stop", "prompt_tokens": 1, "new_tokens": 2, "error": None}


def lines(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_json_lines_are_rows_with_their_ids_and_their_faults(tmp_path):
    path = lines(
        tmp_path / "a.jsonl",
        b'\xef\xbb\xbf{"id": 1}\r\n\n  \n{"prompt": "a"}\n[1]\n{"id"\n"\xff"\n{"id": "\\ud800"}\n{"id": null}\n'
        b'{"id": "5"}\n{"id": true}\n{"id": 5.0}',
    )
    rows = [*read_rows(path)]
    assert [(row.number, row.id) for row in rows] == [
        (1, 1), *((number, f"line-{number}") for number in range(4, 10)), (10, "5"), (11, "line-11"), (12, "line-12"),
    ]  # fmt: skip
    assert rows[1].content == {"prompt": "a"}
    assert rows[2].content == f"line 5 of {path} holds no object: a row was expected"
    for place in (3, 4, 5):
        assert f"line {rows[place].number} of {path} is not valid JSON" in str(rows[place].content)


def test_a_line_of_any_length_is_one_row_or_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_JSON", 50)
    path = lines(tmp_path / "a.jsonl", b'{"id": 1}\n{"id": "' + b"x" * 3_000_000 + b'"}\n{"id": 3}\n' + b"y" * 60)
    rows = [*read_rows(path)]
    assert [row.id for row in rows] == [1, "line-2", 3, "line-4"]
    assert "has more than 50 bytes" in str(rows[1].content)


def test_what_is_no_file_of_rows_is_told(tmp_path):
    with pytest.raises(MissingFileError):
        [*read_rows(tmp_path / "a.jsonl")]
    with pytest.raises(InputError, match="is a folder"):
        [*read_rows(tmp_path)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (Row(1, "x", {"b": 1.0, "id": "x"}), {"id": "x", "b": 1.0, **ANSWER}),
        (Row(2, "line-2", "no row"), {"id": "line-2", **ANSWER}),
        (Row(3, "line-3", {"prompt": "y", "id": 5.5}), {"id": "line-3", "prompt": "y", **ANSWER}),
        (
            Row(4, 1, {"id": 1, "a": [float("nan"), {"b": -float("inf")}], "d": "NaN"}),
            {"id": 1, "a": [None, {"b": None}], "d": "NaN", **ANSWER},
        ),
    ],
)
def test_a_line_of_the_output_has_the_id_the_fields_and_the_answer(row, expected):
    made = answered_line(row, ANSWER)
    assert made.endswith(b"\n")
    assert made.count(b"\n") == 1
    assert "é".encode() in made
    assert json.loads(made, parse_constant=pytest.fail) == expected


def test_an_answer_has_its_fields_and_what_was_asked_for():
    logprobs = [TokenLogprob(0, -0.5, [(0, -0.5), (26, -1.5)])]
    done = Completion("a", [0], "stop_string", 3, 1, 0.1, 0.2, logprobs=logprobs)
    expected = {"text": "a", "finish_reason": "stop_string", "prompt_tokens": 3, "new_tokens": 1, "error": None}
    assert answer_of(done) == expected
    assert answer_of(done, logprobs=True, tools=True) == {
        **expected,
        "logprobs": [{"id": 0, "logprob": -0.5, "top": [(0, -0.5), (26, -1.5)]}],
        "tool_calls": [],
    }
    assert list(error_of("bad")) == list(FIELDS)
    assert error_of("bad")["error"] == "bad"


def test_the_seed_of_a_row_is_that_of_its_id_and_of_the_jobs_alone():
    """Known answers: another program, or a later release, must come to the same."""
    assert seed_of(0, "a") == 8377945124198355113
    found = [seed_of(seed, identity) for seed in (0, 1) for identity in ("1", 1, "é", ["no id", "x", None])]
    assert len(set(found)) == len(found)
    assert all(0 <= seed < 2**63 for seed in found)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Once"}, RowRequest("Once")),
        ({"prompt": [1, 2], "top_k": 3, "stop": None}, RowRequest([1, 2], options={"top_k": 3})),
        ({"messages": HI, "seed": 5}, RowRequest(messages=HI, options={"seed": 5})),
        ({"prompt": "a", "logit_bias": {"3": -1.5}}, RowRequest("a", options={"logit_bias": {3: -1.5}})),
        (
            {"messages": [{"role": "user", "content": "Hi", "name": None, "tool_calls": None}], "tools": []},
            RowRequest(messages=HI),
        ),
        ({"prompt": "a", "topic": "b", "step": 3, "source": 1, "model": "m", "need": 1}, RowRequest("a")),
    ],
)
def test_what_a_row_asks_for(row, expected):
    assert parse_request(row) == expected


def test_the_arguments_of_tool_calls_are_objects_as_templates_take_them():
    def said(arguments: str) -> dict[str, Any]:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return {"messages": [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}, *HI]}

    messages = parse_request(said('{"a": 1}')).messages
    assert messages is not None
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    with pytest.raises(InputError, match="the tool call 1 has arguments that are not JSON"):
        parse_request(said("{"))


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"id": 5.5, "prompt": "a"}, "id is 5.5; a text or a whole number was expected"),
        ({"text": "a", "prompt": "a"}, "the row has the field 'text', which the output has"),
        ({"prompt": "a", "temperture": 0.5}, "the row has the field 'temperture'; did you mean 'temperature'? Else"),
        ({"prompt": "a", "max_tokens": 5}, "did you mean 'max_new_tokens'?"),
        ({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a"}}, 'neither of "prompt" and "messages"'),
        ({"prompt": "a", "messages": HI}, 'both of "prompt" and "messages"'),
        ({"prompt": 5}, "the prompt is 5; a text or a list of token ids was expected"),
        ({"prompt": "a", "tools": [{}]}, "tools are for a conversation"),
        ({"messages": []}, "messages is []; a list of at least one message"),
        ({"messages": [{"content": "a"}]}, "message 1 is {'content': 'a'}; an object with \"role\""),
        ({"messages": HI, "tools": {"a": 1}}, "tools is {'a': 1}; a list of JSON schemas was expected"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias is {'x': 1}; an object of token ids and numbers"),
    ],
)
def test_what_is_wrong_with_a_row_is_told(row, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        parse_request(row)

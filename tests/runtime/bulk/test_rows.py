"""Rows as they are read, the options of each, the error of one that cannot be answered, and its line of output."""

import json
import re

import pytest

from pastkey.errors import InputError, MissingFileError
from pastkey.runtime import Completion, TokenLogprob
from pastkey.runtime.bulk import rows as module
from pastkey.runtime.bulk.rows import Row, RowRequest, parse_request, seed_of

from .rows import HI

ANSWER = {"text": "é", "finish_reason": "stop", "prompt_tokens": 1, "new_tokens": 2, "error": None}


@pytest.fixture
def read(tmp_path):
    """read(CONTENT): the rows of a file."""

    def rows(content):
        (tmp_path / "a.jsonl").write_bytes(content)
        return [*module.read_rows(tmp_path / "a.jsonl")]

    return rows


def test_json_lines_are_rows_with_their_ids_and_their_faults(read):
    rows = read(
        b'\xef\xbb\xbf{"id": 1}\r\n\n  \n{"prompt": "a"}\n[1]\n{"id"\n"\xff"\n{"id": "\\ud800"}\n{"id": null}\n'
        b'{"id": "5"}\n{"id": true}\n{"id": 5.0}'
    )
    ids = [1, *(f"line-{number}" for number in range(4, 10)), "5", "line-11", "line-12"]
    assert [(row.number, row.id) for row in rows] == list(zip([1, *range(4, 13)], ids, strict=True))
    assert rows[1].content == {"prompt": "a"}
    assert re.fullmatch(r"line 5 of .*a\.jsonl holds no object: a row was expected", rows[2].content)
    for place in (3, 4, 5):
        assert re.match(rf"line {rows[place].number} of .*a\.jsonl is not valid JSON", rows[place].content)


def test_a_line_of_any_length_is_one_row_or_one_error(read, monkeypatch):
    monkeypatch.setattr(module, "MOST_JSON", 50)
    rows = read(b'{"id": 1}\n{"id": "' + b"x" * 3_000_000 + b'"}\n{"id": 3}\n' + b"y" * 60)
    assert [row.id for row in rows] == [1, "line-2", 3, "line-4"]
    assert "has more than 50 bytes" in rows[1].content


def test_what_is_no_file_of_rows_is_told(tmp_path):
    with pytest.raises(MissingFileError):
        [*module.read_rows(tmp_path / "a.jsonl")]
    with pytest.raises(InputError, match="is a folder"):
        [*module.read_rows(tmp_path)]


ODD = [float("nan"), {"b": -float("inf")}]


WRITTEN = [
    (Row(1, "x", {"b": 1.0, "id": "x"}), {"id": "x", "b": 1.0}),
    (Row(2, "line-2", "no row"), {"id": "line-2"}),
    (Row(3, "line-3", {"prompt": "y", "id": 5.5}), {"id": "line-3", "prompt": "y"}),
    (Row(4, 1, {"id": 1, "a": ODD, "d": "NaN"}), {"id": 1, "a": [None, {"b": None}], "d": "NaN"}),
]


@pytest.mark.parametrize(("row", "expected"), WRITTEN)
def test_a_line_of_the_output_has_the_id_the_fields_and_the_answer(row, expected):
    made = module.answered_line(row, ANSWER)
    assert (made.count(b"\n"), made[-1:], "é".encode() in made) == (1, b"\n", True)
    assert json.loads(made, parse_constant=pytest.fail) == {**expected, **ANSWER}


def test_an_answer_has_its_fields_and_what_was_asked_for():
    top = [(0, -0.5), (26, -1.5)]
    done = Completion("a", [0], "stop_string", 3, 1, 0.1, 0.2, logprobs=[TokenLogprob(0, -0.5, top)])
    expected = {"text": "a", "finish_reason": "stop_string", "prompt_tokens": 3, "new_tokens": 1, "error": None}
    assert module.answer_of(done) == expected
    further = {"logprobs": [{"id": 0, "logprob": -0.5, "top": top}], "tool_calls": []}
    assert module.answer_of(done, logprobs=True, tools=True) == {**expected, **further}
    assert (list(module.error_of("bad")), module.error_of("bad")["error"]) == (list(module.FIELDS), "bad")


def test_the_seed_of_a_row_is_that_of_its_id_and_of_the_jobs_alone():
    """Known answers: another program, or a later release, must come to the same."""
    assert seed_of(0, "a") == 8377945124198355113
    found = [seed_of(seed, identity) for seed in (0, 1) for identity in ("1", 1, "é", ["no id", "x", None])]
    assert len(set(found)) == len(found)
    assert all(0 <= seed < 2**63 for seed in found)


NULLS = [{**HI[0], "name": None, "tool_calls": None}]


ASKED = [
    ({"prompt": "Once"}, RowRequest("Once")),
    ({"prompt": [1, 2], "top_k": 3, "stop": None}, RowRequest([1, 2], options={"top_k": 3})),
    ({"messages": HI, "seed": 5}, RowRequest(messages=HI, options={"seed": 5})),
    ({"prompt": "a", "logit_bias": {"3": -1.5}}, RowRequest("a", options={"logit_bias": {3: -1.5}})),
    ({"messages": NULLS, "tools": []}, RowRequest(messages=HI)),
    ({"prompt": "a", "topic": "b", "step": 3, "source": 1, "model": "m", "need": 1}, RowRequest("a")),
]


@pytest.mark.parametrize(("row", "expected"), ASKED)
def test_what_a_row_asks_for(row, expected):
    assert parse_request(row) == expected


def test_the_arguments_of_tool_calls_are_objects_as_templates_take_them():
    def called(arguments):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        said = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}, *HI]
        return parse_request({"messages": said}).messages[1]["tool_calls"][0]["function"]["arguments"]

    assert called('{"a": 1}') == {"a": 1}
    with pytest.raises(InputError, match="the tool call 1 has arguments that are not JSON"):
        called("{")


WRONG = [
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
]


@pytest.mark.parametrize(("row", "sentence"), WRONG)
def test_what_is_wrong_with_a_row_is_told(row, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        parse_request(row)

"""Files of rows, as they are read and as they are written again."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pastkey.errors import InputError, IntegrityError, MissingExtraError, MissingFileError
from pastkey.runtime.bulk import tables
from pastkey.runtime.bulk.answers import openai_error, plain_error
from pastkey.runtime.bulk.tables import JsonLines, ParquetTable, open_table

ANSWER = {"text": "é", "finish_reason": "stop", "prompt_tokens": 1, "new_tokens": 2, "error": None}


def lines(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def written(path: Path, answers: Mapping[str, Any], further: Sequence[str] = ()) -> bytes:
    """The output with these answers by id, all others ANSWER; None leaves a row out."""
    out = io.BytesIO()
    open_table(path).write(out, lambda entry: answers.get(str(entry.id), ANSWER), further)
    return out.getvalue()


def test_json_lines_are_rows_with_their_ids_and_their_faults(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl",
        b'\xef\xbb\xbf{"id": 1}\r\n\n  \n{"prompt": "a"}\n[1]\n{"id"\n"\xff"\n{"id": "\\ud800"}\n{"custom_id": "x"}',
    )
    entries = [*open_table(path).entries()]
    assert [(entry.number, entry.id) for entry in entries] == [
        (1, 1), (4, "line-4"), (5, "line-5"), (6, "line-6"), (7, "line-7"), (8, "line-8"), (9, "x"),
    ]  # fmt: skip
    assert entries[1].content == {"prompt": "a"}
    assert entries[2].content == f"line 5 of {path} holds no object: a row was expected"
    for place in (3, 4, 5):
        assert f"line {entries[place].number} of {path} is not valid JSON" in str(entries[place].content)


def test_a_line_of_any_length_is_one_row_or_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MOST_JSON", 50)
    path = lines(tmp_path / "a.jsonl", b'{"id": 1}\n{"id": "' + b"x" * 3_000_000 + b'"}\n{"id": 3}\n' + b"y" * 60)
    entries = [*open_table(path).entries()]
    assert [entry.id for entry in entries] == [1, "line-2", 3, "line-4"]
    assert "has more than 50 bytes" in str(entries[1].content)


def test_json_lines_are_written_in_order_with_their_fields(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", b'{"b": 1.0, "id": "x"}\nbad\n{"prompt": "y"}\n{"id": "left out"}\n')
    made = written(path, {"line-2": plain_error("wrong"), "left out": None})
    assert made.endswith(b"\n")
    assert [json.loads(line) for line in made.splitlines()] == [
        {"b": 1.0, "id": "x", **ANSWER},
        {"id": "line-2", **plain_error("wrong")},
        {"id": "line-3", "prompt": "y", **ANSWER},
    ]
    assert "é".encode() in made


def test_numbers_that_json_has_not_are_written_as_null(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", b'{"id": 1, "a": [NaN, {"b": -Infinity}], "c": 1e999, "d": "NaN \xc3\xa9"}\n')
    answer = ANSWER | {"logprobs": [{"logprob": float("nan"), "top": [(3, -float("inf"))]}]}
    made = json.loads(written(path, {"1": answer}), parse_constant=pytest.fail)
    row = {"id": 1, "a": [None, {"b": None}], "c": None, "d": "NaN é"}
    assert made == row | ANSWER | {"logprobs": [{"logprob": None, "top": [[3, None]]}]}


def test_openais_rows_are_written_in_its_form(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", b'{"custom_id": "x", "url": "/v1/completions", "body": {}}\nbad\n')
    answer = {"response": {"status_code": 200}, "error": None}
    first, second = map(json.loads, written(path, {"x": answer, "line-2": plain_error("wrong")}).splitlines())
    assert first == {"id": first["id"], "custom_id": "x", **answer}
    assert second["custom_id"] == "line-2"
    sentence = second["error"]["message"]
    assert sentence.startswith("line 2 of")
    assert second == {"id": second["id"], "custom_id": "line-2", **openai_error("line-2", sentence)}


def test_what_is_no_file_of_rows_is_told(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        open_table(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="is a folder"):
        open_table(tmp_path)


def test_without_pyarrow_a_sentence_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match="the package 'pyarrow' is not installed"):
        open_table(lines(tmp_path / "a.parquet", b"PAR1"))


# --- Parquet ------------------------------------------------------------------------------------------------------
def parquet(path: Path, columns: dict[str, Any], **how: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path, **how)
    return path


def read(content: bytes) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(io.BytesIO(content))


def test_parquet_rows_keep_their_types_and_have_the_answers_beside_them(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    when = pyarrow.array([1, 2, 3], pyarrow.timestamp("ms"))
    path = parquet(
        tmp_path / "rows", {"id": [7, None, 9], "prompt": ["a", None, "c"], "when": when, "raw": [b"\0", b"", b"\xff"]}
    )
    assert isinstance(open_table(path), ParquetTable)  # by its first bytes
    entries = [*open_table(path).entries()]
    assert [(entry.number, entry.id) for entry in entries] == [(1, 7), (2, "row-2"), (3, 9)]
    made = read(written(path, {"row-2": plain_error("wrong"), "9": None}))
    assert made.column("when").type == pyarrow.timestamp("ms")
    assert made.column("raw").to_pylist() == [b"\0", b""]
    assert made.column("text").to_pylist() == ["é", None]
    assert made.column("error").to_pylist() == [None, "wrong"]
    assert made.column("new_tokens").to_pylist() == [2, None]
    assert made.schema.field("prompt_tokens").type == pyarrow.int64()


def test_parquet_rows_without_ids_get_a_column_of_them(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"prompt": ["a"] * 2500}, row_group_size=700)
    assert [entry.id for entry in open_table(path).entries()] == [f"row-{n}" for n in range(1, 2501)]
    calls = {**ANSWER, "tool_calls": [{"name": "f", "arguments": {}}]}
    made = read(written(path, {"row-2": calls}, ["tool_calls"]))
    assert made.column_names == ["prompt", "id", *ANSWER, "tool_calls"]
    assert made.num_rows == 2500
    assert made.column("id").to_pylist()[-1] == "row-2500"
    assert made.column("tool_calls").to_pylist()[:2] == [None, '[{"name": "f", "arguments": {}}]']


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"topic": ["a"]}, '"prompt" or "messages" was expected'),
        ({"prompt": ["a"], "text": ["b"]}, "has the column 'text', which the output has for the answer"),
        ({"prompt": ["a"], "logprobs": [1]}, "has the column 'logprobs'"),
    ],
)
def test_parquet_columns_that_cannot_be_are_told(tmp_path: Path, columns: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        open_table(parquet(tmp_path / "a.parquet", columns))


def test_a_damaged_parquet_file_is_told(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"prompt": ["a" * 100] * 1000}, compression="none", use_dictionary=False)
    content = path.read_bytes()
    for damaged in (content[:500], b"PAR1", content[:4] + b"\xff" * 2000 + content[2004:]):
        with pytest.raises(IntegrityError, match="cannot be read as a Parquet file"):
            [*open_table(lines(path, damaged)).entries()]


def test_json_lines_are_what_is_no_parquet(tmp_path: Path) -> None:
    table = open_table(lines(tmp_path / "a", b""))
    assert isinstance(table, JsonLines)
    assert [*table.entries()] == []

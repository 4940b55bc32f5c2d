"""Rows that an untrusted bundle answers, in the process with limits."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from typing import Any

import pytest

from pastkey.runtime.sandbox import process

from .conftest import hooked

Command = Callable[..., tuple[int, str, str]]


def rows() -> list[dict[str, Any]]:
    """Some begin alike, one is a conversation, one is wrong."""
    long = "the cat and the dog and the bird sat. "
    said = [{"role": "user", "content": "hi"}]
    return [*({"prompt": f"{long}{end}"} for end in "abc"), {"messages": said}, {"prompt": ""}]


def lines(content: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in content)


def test_rows_are_answered_in_the_process(command, talking_bundle, tmp_path):
    source, template, answers = tmp_path / "rows.jsonl", tmp_path / "own.jinja", []
    source.write_text(lines(rows()))
    template.write_text("{{ messages[0].content }}")
    zipped = tmp_path / "b.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        for part in talking_bundle.path.rglob("*"):
            archive.write(part, f"b/{part.relative_to(talking_bundle.path)}")
    flags = ("--threads", 1, "--max-new-tokens", 4, "--template", template)
    for name, bundle, more in (
        ("here", talking_bundle.path, ()),
        ("there", talking_bundle.path, ("--untrusted", "--limit", "seconds=60")),
        ("zip", zipped, ("--untrusted", "--exact")),
    ):
        out = tmp_path / f"{name}.jsonl"
        status, _, err = command("batch", bundle, source, "--out", out, *flags, *more)
        assert status == 0, err
        answers.append({row["id"]: row for row in map(json.loads, out.read_text().splitlines())})
    assert answers[0] == answers[1] == answers[2]
    assert [row["id"] for row in answers[1].values() if row["error"] is not None] == ["line-5"]


HONEST = "{'place': 0, 'answer': dict(text='a', finish_reason='stop', prompt_tokens=1, new_tokens=1, error=None)}"


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ("os._exit(5)", "asked to answer rows, ended with status 5; limits in force"),
        ("iter([])", "left rows without an answer"),
        (f"iter([{HONEST}, {HONEST}])", "answered a row that was not asked for"),
        (f"iter([{HONEST.replace('0', '7', 1)}])", "answered a row that was not asked for"),
        ("iter([{'place': 0, 'answer': {}}])", "gave an answer that is none"),
        (f"iter([{HONEST.replace('text=', 'id=5, text=')}])", "gave an answer that is none (answer has an unkn"),
        (f"iter([{HONEST.replace('new_tokens=1', 'new_tokens=-1')}])", "gave an answer that is none (new_tokens is -1"),
        ("iter([{'answer': {}}])", "gave an answer that is none (the answer has no 'place')"),
    ],
)
def test_a_process_that_was_taken_over_ends_the_job(command, talking_bundle, tmp_path, monkeypatch, answers, told):
    """And is no row's own error; nor is the bundle opened here instead."""
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text(lines([{"prompt": "ab"}]))
    hook = "import os\nfrom pastkey.runtime.commands import untrusted_rows\n"
    hook += f"untrusted_rows.answer_here = lambda *_, **__: {answers}\n"
    monkeypatch.setattr(process, "BOOT", hooked(hook))
    status, _, err = command("batch", talking_bundle.path, source, "--out", out, "--threads", 1, "--untrusted")
    assert status == 2
    assert told in err
    honest = answers.count("'place': 0") == 2  # the first of them was written
    assert len(out.read_text().splitlines()) == honest


@pytest.mark.parametrize("flags", [("--provider", "cuda"), ("--provider", "cpu", "--provider-option", "a=b")])
def test_rows_are_answered_on_the_cpu_alone(command, talking_bundle, tmp_path, flags):
    source = tmp_path / "rows.jsonl"
    source.write_text(lines([{"prompt": "ab"}]))
    status, _, err = command("batch", talking_bundle.path, source, "--out", tmp_path / "o.jsonl", "--untrusted", *flags)
    assert status == 2
    assert "an untrusted bundle runs on the CPU alone" in err


def test_a_command_that_would_not_heed_a_flag_has_none(command, talking_bundle):
    """`sign` is for one's own bundle, and `batch` has no draft model."""
    for arguments, flag in (
        (("sign", talking_bundle.path, "--key", "key.pem"), ("--untrusted",)),
        (("batch", talking_bundle.path, "in.jsonl", "--out", "out.jsonl"), ("--draft=b",)),
    ):
        status, _, err = command(*arguments, *flag)
        assert status == 2
        assert f"no flag {flag[0].partition('=')[0]}" in err

"""Commands with --untrusted: the bundle is opened in a process with limits, and what it says is looked at."""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

import pytest

from pastkey.errors import InputError
from pastkey.runtime.commands.flags import limits_of
from pastkey.runtime.sandbox import process
from pastkey.runtime.sandbox.limits import Limits

from ..sandbox import conftest as bundles

hostile, talking_bundle = bundles.hostile, bundles.talking_bundle
UNTRUSTED = ("--untrusted", "--limit", "seconds=60")


def test_what_limit_says():
    def given(*pairs: tuple[str, str]) -> Limits:
        return limits_of(argparse.Namespace(limits=pairs))

    assert given() == Limits()
    assert given(("memory", "4e9"), ("seconds", "2.5")) == Limits(4_000_000_000, 2.5)
    with pytest.raises(InputError):
        given(("memory", "inf"))


@pytest.mark.parametrize("name", ["run", "chat"])
def test_run_and_chat_answer_as_without_the_wall(command, talking_bundle, name):
    flags = ("--prompt", "hello", "--max-new-tokens", 5, "--threads", 1)
    plain, limited = (command(name, talking_bundle.path, *flags, *more) for more in ((), UNTRUSTED))
    assert limited[:2] == plain[:2]
    assert plain[0] == 0


def test_inspect_and_bench(command, talking_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    plain, limited = (command("inspect", talking_bundle.path, "--threads", 1, *more) for more in ((), UNTRUSTED))
    assert limited[:2] == plain[:2]
    assert list(tmp_path.iterdir()) == []
    status, out, _ = command(
        "bench", talking_bundle.path, "--prompt-tokens", 8, "--new-tokens", 2, "--json", *UNTRUSTED
    )
    assert status == 0
    assert json.loads(out)["settings"]["prompt_tokens"] == 8


def test_a_hostile_bundle_is_one_sentence_and_status_2(command, hostile):
    limits = ("--limit", "seconds=1", "--limit", "memory=400e6")
    status, out, err = command("run", hostile("a loop"), "--prompt", "hello", "--untrusted", *limits)
    assert (status, out.strip()) == (2, "")
    (line,) = [line for line in err.splitlines() if "not in force" not in line or "gave no answer" in line]
    assert line.startswith("pastkey run: the process of the untrusted bundle ")
    assert "gave no answer within 1 s, and was ended; limits in force: 1 s for an answer, 400 MB of memory" in line


REFUSED = {
    "limits alone": (("--limit", "seconds=2"), "--limit is for a bundle that is not trusted: add --untrusted"),
    "no such limit": (("--untrusted", "--limit", "colour=2"), "--limit colour=2 was given; memory=BYTES or seconds=S"),
    "no number": (("--untrusted", "--limit", "memory=much"), "--limit memory=much was given"),
    "no time": (("--untrusted", "--limit", "seconds=-1"), "seconds is -1.0"),
    "an option": (("--untrusted", "--provider-option", "a=b"), "--provider-option is for an execution provider"),
    "a provider": (("--untrusted", "--provider", "cuda"), "an untrusted bundle runs on the CPU alone"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("name", ["run", "bench", "batch"])
def test_flags_that_do_not_fit(command, talking_bundle, tmp_path, name, case):
    (tmp_path / "in.jsonl").write_text('{"prompt": "ab"}\n')
    own = {"run": ("--prompt", "a"), "bench": (), "batch": (tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")}
    flags, words = REFUSED[case]
    status, out, err = command(name, talking_bundle.path, *own[name], *flags)
    assert (status, out) == (2, "")
    assert words in err


def test_what_a_terminal_would_act_on_is_not_printed(command, talking_bundle, monkeypatch):
    hook = "from pastkey.runtime.commands import rerun\n"
    hook += "rerun.run_here = lambda *_, **__: dict(status=77, out='a\\x1b[31mé\\n', error='b\\x07\\n')\n"
    monkeypatch.setattr(process, "BOOT", bundles.hooked(hook))
    found: tuple[Any, ...] = command("inspect", talking_bundle.path, "--untrusted")
    assert found[:2] == (2, "a?[31mé\n")
    assert found[2].endswith("b?\n")


# --- rows of a batch ----------------------------------------------------------------------------------------------
def test_rows_are_answered_in_the_process(command, talking_bundle, tmp_path):
    """Some begin alike, one is a conversation, one is wrong."""
    long, said = "the cat and the dog and the bird sat. ", [{"role": "user", "content": "hi"}]
    rows: list[Any] = [*({"prompt": f"{long}{end}"} for end in "abc"), {"messages": said}, {"prompt": ""}]
    source, template, answers = tmp_path / "rows.jsonl", tmp_path / "own.jinja", []
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template.write_text("{{ messages[0].content }}")
    for name, more in (("here", ()), ("there", UNTRUSTED)):
        out = tmp_path / f"{name}.jsonl"
        flags = ("--threads", 1, "--max-new-tokens", 4, "--template", template)
        status, _, err = command("batch", talking_bundle.path, source, "--out", out, *flags, *more)
        assert status == 0, err
        answers.append({row["id"]: row for row in map(json.loads, out.read_text().splitlines())})
    assert answers[0] == answers[1]
    assert [row["id"] for row in answers[1].values() if row["error"] is not None] == ["line-5"]


HONEST = "{'place': 0, 'answer': dict(text='a', finish_reason='stop', prompt_tokens=1, new_tokens=1, error=None)}"


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ("os._exit(5)", "asked to answer rows, ended with status 5; limits in force"),
        ("iter([])", "left rows without an answer"),
        (f"iter([{HONEST}, {HONEST}])", "answered a row that was not asked for"),
        (f"iter([{HONEST.replace('text=', 'id=5, text=')}])", "gave an answer that is none (answer has an unkn"),
    ],
)
def test_a_process_that_was_taken_over_ends_the_job(command, talking_bundle, tmp_path, monkeypatch, answers, words):
    """And is no row's own error; nor is the bundle opened here instead."""
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "ab"}\n')
    hook = "import os\nfrom pastkey.runtime.commands import untrusted_rows\n"
    hook += f"untrusted_rows.answer_here = lambda *_, **__: {answers}\n"
    monkeypatch.setattr(process, "BOOT", bundles.hooked(hook))
    status, _, err = command("batch", talking_bundle.path, source, "--out", out, "--threads", 1, "--untrusted")
    assert status == 2
    assert words in err
    honest = answers.count("'place': 0") == 2  # the first of them was written
    assert len(out.read_text().splitlines()) == honest


@pytest.mark.parametrize(
    "arguments", [("sign", "b", "--key", "k.pem", "--untrusted"), ("batch", "b", "in.jsonl", "--out", "o", "--draft=b")]
)
def test_a_command_that_would_not_heed_a_flag_has_none(command, arguments):
    """`sign` is for one's own bundle, and `batch` has no draft model."""
    status, _, err = command(*arguments)
    assert (status, f"no flag {arguments[-1].partition('=')[0]}" in err) == (2, True)

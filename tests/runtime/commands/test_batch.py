"""`pastkey batch` as it is typed: rows in, rows with answers out, whatever ends it in the middle."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pastkey.__main__ import main
from pastkey.contract.bundle import open_bundle
from pastkey.runtime import load
from pastkey.runtime.bulk.job import Job, job_file
from pastkey.runtime.bulk.rows import seed_of
from pastkey.runtime.model.session_file import bundle_digest

from ..bulk.rows import plain_rows, read_rows, write_rows

FLAGS = ["--threads", "1", "--temperature", "1", "--max-new-tokens", "9"]


def batch(bundle: Path, source: Path, out: Path, *flags: str) -> int:
    return main(["batch", str(bundle), str(source), "--out", str(out), *FLAGS, *flags])


def told(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1, sentence
    assert all(word in sentence for word in words), sentence


def answers(out: Path) -> dict[Any, dict[str, Any]]:
    """The rows by their ids, which are there once."""
    rows = read_rows(out)
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def test_rows_of_every_kind_are_answered_and_reported(talking, tmp_path, capsys):
    rows: list[Any] = [
        *plain_rows(5),
        {"prompt": "ab", "max_new_tokens": 2, "temperature": 0},
        {"id": "m", "messages": [{"role": "user", "content": "hi"}]},
        "no json",
        {"id": "bad", "prompt": 5},
    ]
    out = tmp_path / "out.jsonl"
    assert batch(talking, write_rows(tmp_path / "in.jsonl", rows), out, "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert "9 of 9 rows, 2 with an error" in captured.err
    made = answers(out)
    model = load(talking, threads=1)
    for row in plain_rows(5):
        answer = model.generate(row["prompt"], seed=seed_of(0, row["id"]), temperature=1.0, max_new_tokens=9)
        expected = {"text": answer.text, "new_tokens": answer.new_tokens, "error": None}
        assert {**row, **expected}.items() <= made[row["id"]].items()
    assert made["line-6"]["new_tokens"] == 2
    assert made["m"]["text"]
    assert [identity for identity, row in made.items() if row["error"] is not None] == ["line-8", "bad"]
    assert {name: report[name] for name in ("out", "rows", "errors", "resumed", "new_tokens", "bundle")} == {
        "out": str(out),
        "rows": 9,
        "errors": 2,
        "resumed": 0,
        "new_tokens": sum(row["new_tokens"] or 0 for row in made.values()),
        "bundle": bundle_digest(open_bundle(talking)),
    }
    assert report["rows_per_second"] > 0
    assert batch(talking, tmp_path / "in.jsonl", out) == 0
    captured = capsys.readouterr()
    assert "9 of 9 rows are answered already" in captured.err
    assert "9 rows, 2 with an error" in captured.out


@pytest.mark.parametrize(
    ("rows", "status"),
    [(["no json", {"prompt": 5}], 1), (["no json"], 1), (["no json", {"prompt": "ab"}], 0), ([], 0)],
)
def test_a_job_whose_every_row_fails_ends_with_status_1(talking, tmp_path, rows, status, capsys):
    source, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert batch(talking, source, out) == status
    assert batch(talking, source, out) == status  # a finished job says the same again
    assert len(read_rows(out)) == len(rows)


# A command that is sent a signal by itself with its seventh answer.
SIGNALLED = """
import os, signal, sys
from pastkey.__main__ import main
from pastkey.runtime.bulk.job import Job
signal.signal(signal.SIGINT, signal.default_int_handler)  # which the background of a shell ignores
add, rows = Job.add, []
def signalled(job, row, answer):
    add(job, row, answer)
    rows.append(row)
    if len(rows) == 7:
        os.kill(os.getpid(), int(sys.argv[1]))
Job.add = signalled
sys.exit(main(sys.argv[2:]))
"""


def test_a_job_that_is_terminated_goes_on(talking, tmp_path):
    """By SIGTERM and by Ctrl-C, each time when a few rows more are written."""
    source, out, whole = write_rows(tmp_path / "in.jsonl", plain_rows(30)), tmp_path / "out.jsonl", tmp_path / "w.jsonl"
    assert batch(talking, source, whole) == 0
    before = b""
    for number, status in ((signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)):
        command = [sys.executable, "-c", SIGNALLED, str(int(number)), "batch", talking, source, "--out", out, *FLAGS]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert "of 30 rows are answered: the same command goes on" in done.stderr
        assert out.read_bytes().startswith(before)
        assert len(out.read_bytes()) > len(before)
        before = out.read_bytes()
    assert batch(talking, source, out) == 0
    assert out.read_bytes().startswith(before)
    assert answers(out) == answers(whole)


def test_shards_give_what_the_whole_gives(talking, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", plain_rows(21))
    parts = [tmp_path / f"{part}.jsonl" for part in (1, 2)]
    assert batch(talking, source, tmp_path / "whole.jsonl") == 0
    for part, out in enumerate(parts, 1):
        assert batch(talking, source, out, "--shard", f"{part}/2") == 0
    assert answers(parts[0]) | answers(parts[1]) == answers(tmp_path / "whole.jsonl")


def test_a_jobs_settings_stand_in_its_file(talking, tmp_path, capsys):
    source, out, template = write_rows(tmp_path / "in.jsonl", plain_rows(4)), tmp_path / "a.jsonl", tmp_path / "t.jinja"
    template.write_text("{{ messages[0].content }}")
    flags = ("--logprobs", "1", "--exact", "--template", str(template))
    assert batch(talking, source, out, *flags) == 0
    assert all(len(row["logprobs"]) == row["new_tokens"] == 9 for row in read_rows(out))
    written = json.loads(job_file(out).read_text())
    assert (written["exact"], written["temperature"], written["seed"]) == (True, 1.0, 0)
    template.write_text("another")
    capsys.readouterr()
    assert batch(talking, source, out, *flags) == 2
    assert "was begun with template" in capsys.readouterr().err


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b"])
def test_a_shard_is_one_of_several(talking, tmp_path, shard, capsys):
    source = write_rows(tmp_path / "in.jsonl", plain_rows(2))
    assert batch(talking, source, tmp_path / "o.jsonl", f"--shard={shard}") == 2
    told(capsys, f"--shard is '{shard}'; I/N was expected")


def test_mistakes_are_one_sentence(talking, tmp_path, capsys):
    source, out = write_rows(tmp_path / "in.jsonl", plain_rows(2)), tmp_path / "o.jsonl"
    assert batch(talking, tmp_path / "none", out) == 2
    told(capsys, "no such file")
    assert main(["batch", str(tmp_path), str(source), "--out", str(out)]) == 2
    told(capsys, "is not a bundle")
    twice = write_rows(tmp_path / "twice.jsonl", [*plain_rows(2), *plain_rows(1)])
    assert batch(talking, twice, out) == 2
    told(capsys, "has the id 0 twice")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "twice.jsonl"]
    out.write_text("mine")
    assert batch(talking, source, out) == 2
    told(capsys, "already exists")


def test_a_full_disk_is_told_with_what_was_answered(talking, tmp_path, monkeypatch, capsys):
    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = write_rows(tmp_path / "in.jsonl", plain_rows(2))
    with monkeypatch.context() as patch:
        patch.setattr(Job, "add", fill)
        assert batch(talking, source, tmp_path / "o.jsonl") == 2
    err = capsys.readouterr().err
    assert "0 of 2 rows are answered: the same command goes on\n" in err
    assert "the disk is full" in err
    assert batch(talking, source, tmp_path / "o.jsonl") == 0

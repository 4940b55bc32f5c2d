"""`pastkey batch` as it is typed: rows in, rows with answers out, whatever ends it in the middle."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from pastkey.contract.bundle import open_bundle
from pastkey.runtime.bulk.job import Job, job_file
from pastkey.runtime.bulk.rows import seed_of
from pastkey.runtime.model.session_file import bundle_digest

from ..bulk.rows import plain_rows, read_rows
from .conftest import BATCH


def answers(out):
    """The rows by their ids, which are there once."""
    rows = read_rows(out)
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def test_rows_of_every_kind_are_answered_and_reported(talking, model, batch, out):
    messages = [{"role": "user", "content": "hi"}]
    rows = [
        *plain_rows(2), {"prompt": "ab", "max_new_tokens": 2, "temperature": 0}, {"id": "m", "messages": messages},
        "no json", {"id": "bad", "prompt": 5},
    ]  # fmt: skip
    status, report, err = batch(rows, "--json")
    assert (status, "6 of 6 rows, 2 with an error" in err) == (0, True)
    made, report = answers(out), json.loads(report)
    answer = model.generate(rows[1]["prompt"], seed=seed_of(0, 1), temperature=1.0, max_new_tokens=9)
    assert {**rows[1], "text": answer.text, "new_tokens": 9, "error": None}.items() <= made[1].items()
    assert made["line-3"]["new_tokens"] == 2
    assert made["m"]["text"]
    assert [identity for identity, row in made.items() if row["error"] is not None] == ["line-5", "bad"]
    assert report.pop("rows_per_second") > 0
    assert report.items() >= {
        "out": str(out), "rows": 6, "errors": 2, "resumed": 0, "bundle": bundle_digest(open_bundle(talking)),
        "new_tokens": sum(row["new_tokens"] or 0 for row in made.values()),
    }.items()  # fmt: skip
    status, report, err = batch(rows)
    assert (status, "6 of 6 rows are answered already" in err, "6 rows, 2 with an error" in report) == (0, True, True)


FAILING = [(["no json", {"prompt": 5}], 1), (["no json"], 1), (["no json", {"prompt": "ab"}], 0), ([], 0)]


@pytest.mark.parametrize(("rows", "status"), FAILING)
def test_a_job_whose_every_row_fails_ends_with_status_1(batch, out, rows, status):
    assert batch(rows)[0] == batch(rows)[0] == status  # a finished job says the same again
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


def test_a_job_that_is_terminated_goes_on(talking, batch, tmp_path, out):
    """By SIGTERM and by Ctrl-C, each time when a few rows more are written."""
    rows, whole, before = plain_rows(30), tmp_path / "whole.jsonl", b""
    assert batch(rows, out=whole)[0] == 0
    for number, status in ((signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)):
        arguments = ("batch", talking, tmp_path / "in.jsonl", "--out", out, *BATCH)
        command = [sys.executable, "-c", SIGNALLED, str(int(number)), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert "of 30 rows are answered: the same command continues" in done.stderr
        assert out.read_bytes().startswith(before)
        assert len(out.read_bytes()) > len(before)
        before = out.read_bytes()
    assert batch(rows)[0] == 0
    assert out.read_bytes().startswith(before)
    assert answers(out) == answers(whole)


def test_shards_give_what_the_whole_gives(batch, tmp_path, out):
    parts = [tmp_path / f"{part}.jsonl" for part in (1, 2)]
    assert batch(plain_rows(21))[0] == 0
    for part, target in enumerate(parts, 1):
        assert batch(plain_rows(21), "--shard", f"{part}/2", out=target)[0] == 0
    assert answers(parts[0]) | answers(parts[1]) == answers(out)


def test_a_jobs_settings_stand_in_its_file(batch, tmp_path, out):
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0].content }}")
    flags = ("--logprobs", "1", "--exact", "--template", template)
    assert batch(plain_rows(4), *flags)[0] == 0
    assert all(len(row["logprobs"]) == row["new_tokens"] == 9 for row in read_rows(out))
    written = json.loads(job_file(out).read_text())
    assert (written["exact"], written["temperature"], written["seed"]) == (True, 1.0, 0)
    template.write_text("another")
    status, _, err = batch(plain_rows(4), *flags)
    assert (status, "belongs to a job with template" in err) == (2, True)


def test_a_full_disk_is_told_with_what_was_answered(batch, monkeypatch):
    def fill(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Job, "add", fill)
        status, _, err = batch(plain_rows(2))
    assert (status, "the disk is full" in err) == (2, True)
    assert "0 of 2 rows are answered: the same command continues\n" in err
    assert batch(plain_rows(2))[0] == 0

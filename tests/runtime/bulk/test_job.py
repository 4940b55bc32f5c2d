"""A job continues where it was ended, has each answer once, and refuses changes that would mix two."""

import errno
import json
import os
import re
from pathlib import Path

import pytest

from pastkey.errors import ExistingFolderError, InputError, IntegrityError, InUseError
from pastkey.runtime.bulk.job import job_file, open_job, refuse_output, shard_ids
from pastkey.runtime.bulk.rows import error_of

from .rows import plain_rows, read_rows, write_rows

WANTED = {"bundle": "b", "shard": "", "temperature": 0.5}


@pytest.fixture
def source(tmp_path):
    return write_rows(tmp_path / "in.jsonl", plain_rows(10))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "sub" / "out.jsonl"


def answer(job, most=100):
    """Answers rows, in another order, the fourth with an error; returns how many."""
    rows = [*job.rows()][:most]
    for row in reversed(rows):
        job.add(row, error_of("bad") if row.id == 3 else {"text": f"of {row.id}", "error": None})
    return len(rows)


def run(source, out, most=100, *, force=False, meanwhile=lambda job: None, **changes):
    """Opens the job, answers so many rows, and does something more with it. Returns the number of rows."""
    wanted = WANTED | changes
    with open_job(source, out, shard_ids(source, str(wanted["shard"])), wanted, force=force) as job:
        before = job.done
        count = answer(job, most)
        assert job.done == before + count
        assert job.errors == 1 or not job.done == job.total == 10
        meanwhile(job)
    return count


def complete(source, out):
    rows = sorted(read_rows(out), key=lambda row: row["id"])
    assert [row["id"] for row in rows] == [row["id"] for row in read_rows(source)]
    assert all(row["topic"] and row["error" if row["id"] == 3 else "text"] for row in rows)
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.jsonl", "out.jsonl.job"]


def test_rows_are_answered_once_whatever_the_stops(source, out):
    assert run(source, out, 4) == 4
    assert [row["id"] for row in read_rows(out)] == [3, 2, 1, 0]
    assert [run(source, out, 4), run(source, out)] == [4, 2]
    complete(source, out)
    before = out.read_bytes()
    assert run(source, out) == 0
    assert out.read_bytes() == before
    assert json.loads(job_file(out).read_text())["temperature"] == 0.5


SPOILT = {  # the change of an output of four rows -> how many are still there, or None where it is refused
    "cut in a line": (lambda content: content[:-5], 3),
    "without its last line's end": (lambda content: content[:-1], 3),
    "cut in the first line": (lambda content: content[:9], 0),
    "emptied": (lambda content: b"", 0),
    "with zeros of a power cut": (lambda content: content + b"\0" * 40, 4),
    "with a block that was never written": (lambda content: content + b'\0\0\0\n{"id":8,"text":"x"}\n', 4),
    "with a line that has no end": (lambda content: content + b'{"id":9,"text":"x"}', 4),
    "with a line of no JSON": (lambda content: b"x\n" + content, None),
    "with a line of no object": (lambda content: b"3\n" + content, None),
    "with a line of an odd id": (lambda content: b'{"id":1.5}\n' + content, None),
    "with a line of no id": (lambda content: b'{"text":"a"}\n' + content, None),
    "with a line of no text": (lambda content: b"\xff\n" + content, None),
}


@pytest.mark.parametrize(("spoil", "kept"), SPOILT.values(), ids=SPOILT)
def test_an_output_that_was_spoilt_goes_on_from_its_whole_lines_or_is_refused_and_left_alone(source, out, spoil, kept):
    run(source, out, 4)
    whole = out.read_bytes()
    out.write_bytes(spoil(whole))
    if kept is None:
        with pytest.raises(IntegrityError, match="line 1"):
            run(source, out)
        assert out.read_bytes() == spoil(whole)
        assert run(source, out, force=True) == 10
        return
    assert run(source, out, 0) == 0
    assert out.read_bytes() == b"".join(whole.splitlines(keepends=True)[:kept])
    assert run(source, out) == 10 - kept
    complete(source, out)


CHANGED = [
    ({"bundle": "c"}, "belongs to a job with bundle 'b', and now it is 'c': give the same"),
    ({"shard": "1/2"}, "belongs to a job with shard '', and now it is '1/2'"),
]


@pytest.mark.parametrize(("changes", "words"), CHANGED)
def test_a_job_does_not_go_on_with_something_else(source, out, changes, words):
    for most in (3, 100):
        run(source, out, most)
        with pytest.raises(InputError, match=re.escape(words)):
            run(source, out, **changes)
    complete(source, out)
    assert run(source, out, force=True, **changes) == (5 if "shard" in changes else 10)


def test_an_output_without_its_first_row_begins_as_it_is_asked(source, out):
    """As a kill leaves it between the emptying and the job file of --force."""
    run(source, out, 0)
    assert run(source, out, temperature=0.7) == 10
    complete(source, out)


def test_an_output_of_no_job_is_never_replaced(source, out):
    out.parent.mkdir()
    out.write_text("mine")
    with pytest.raises(ExistingFolderError, match="already exists and pastkey batch did not write it"):
        run(source, out, force=True)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert out.read_text() == "mine"


def test_places_that_cannot_be_are_told(source, tmp_path):
    for out, words in (
        (source / "out.jsonl", r"is under .*, which is a file"),
        (tmp_path, "is a folder; a file was expected"),
        (source, "is the input"),
        (Path(os.devnull), "is a pipe or a device"),
    ):
        with pytest.raises(InputError, match=words):
            refuse_output(out, source)


def test_two_rows_of_one_id_are_refused(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [{"id": 1}, {"id": "1"}, "bad", {"id": 1}])
    with pytest.raises(InputError, match="has the id 1 twice, in lines 1 and 4"):
        shard_ids(source, "2/2")


class Full:
    """A file on a full disk: half of a line is written."""

    def __init__(self, file):
        self.file = file

    def write(self, content):
        self.file.write(content[:7])
        raise OSError(errno.ENOSPC, "no space")


def fill_the_disk(source, out, job):
    job._file = Full(job._file)
    answer(job)


def run_it_again(source, out, job):
    run(source, out, force=True)


def change_the_input(source, out, job):
    answer(job)
    write_rows(source, plain_rows(11))


MEANWHILE = [  # the event after two rows, the error, and how many rows are still to be answered
    (run_it_again, InUseError, "is being written by another process: wait", 8),
    (change_the_input, InputError, "was changed while the job ran", None),
    (fill_the_disk, OSError, "no space", 8),
]


@pytest.mark.parametrize(("happens", "error", "words", "left"), MEANWHILE)
def test_what_happens_meanwhile_is_told_and_keeps_the_answers(source, out, happens, error, words, left):
    with pytest.raises(error, match=words):
        run(source, out, 2, meanwhile=lambda job: happens(source, out, job))
    if left is not None:
        assert run(source, out) == left
        complete(source, out)

"""A job goes on where it was ended, refuses what would mix two, and gives its output whole and in order."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import pytest

from pastkey.errors import ExistingFolderError, InputError, IntegrityError, InUseError, ResourceError
from pastkey.folder import sha256
from pastkey.runtime.bulk import job as module
from pastkey.runtime.bulk.job import (
    Job,
    JobRecord,
    counted_ids,
    job_folder,
    open_job,
    read_record,
    refuse_output,
    require_formats,
)
from pastkey.runtime.bulk.tables import JsonLines

from .rows import plain_rows, read_rows, write_rows


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.jsonl", plain_rows(10))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "sub" / "out.jsonl"


def wanted(source: Path, **changes: Any) -> JobRecord:
    settings: Mapping[str, Any] = {"temperature": 0.5, "seed": 0}
    record = JobRecord("bundle", sha256(source), "", settings, 5, False)
    return dataclasses.replace(record, **changes)


def answer(job: Job, most: int = 100) -> int:
    """Answers rows, in an order of its own; returns how many."""
    rows = [*job.rows()][:most]
    for row in reversed(rows):
        job.add(row.identity, {"text": f"of {row.identity}", "error": None})
    return len(rows)


def run(source: Path, out: Path, most: int = 100, **how: Any) -> int:
    force = how.pop("force", False)
    with open_job(source, out, wanted(source, **how), force=force) as job:
        count = answer(job, most)
        if job.done == job.total and job.record.report is None:
            job.finish({"rows": job.total})
    return count


def complete(source: Path, out: Path) -> None:
    assert [row["id"] for row in read_rows(out)] == [row["id"] for row in read_rows(source)]
    assert all(row["text"] == f"of {row['id']}" and row["topic"] for row in read_rows(out))
    assert [path.name for path in job_folder(out).iterdir()] == ["job.json"]
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


def test_rows_are_answered_once_and_written_in_order(source: Path, out: Path) -> None:
    assert run(source, out, 4) == 4
    assert not out.exists()
    assert run(source, out, 4) == 4
    assert run(source, out) == 2
    complete(source, out)
    record = read_record(job_folder(out) / "job.json")
    assert (record.report, record.created > 10**9) == ({"rows": 10}, True)
    before = out.read_bytes()
    assert run(source, out, 0) == 0
    assert out.read_bytes() == before
    assert out.stat().st_mode == source.stat().st_mode


def test_a_job_that_has_ended_has_its_report(source: Path, out: Path) -> None:
    run(source, out)
    with open_job(source, out, wanted(source)) as job:
        assert job.record.report == {"rows": 10}


def test_an_output_that_was_removed_is_made_anew(source: Path, out: Path) -> None:
    run(source, out)
    out.unlink()
    assert run(source, out) == 10
    complete(source, out)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bundle": "other"}, "was begun with another bundle: give the same"),
        ({"input": "other"}, "was begun with other rows"),
        ({"shard": "1/2"}, "was begun with another --shard"),
        ({"settings": {"temperature": 0.7, "seed": 0}}, "was begun with temperature 0.5, and now it is 0.7"),
        ({"settings": {"temperature": 0.5}}, "was begun with seed 0, and now it is None"),
    ],
)
def test_a_job_does_not_go_on_with_something_else(source: Path, out: Path, changes: Any, words: str) -> None:
    for most in (3, 100):
        run(source, out, most)
        with pytest.raises(InputError, match=re.escape(words)):
            run(source, out, **changes)
    complete(source, out)
    if "input" not in changes and "shard" not in changes:
        assert run(source, out, force=True, **changes) == 10
        complete(source, out)


def test_force_begins_anew_and_keeps_the_old_output_until_the_end(source: Path, out: Path) -> None:
    run(source, out)
    before = out.read_bytes()
    assert run(source, out, 3, force=True) == 3
    assert out.read_bytes() == before
    assert run(source, out, 3) == 3  # it goes on without --force
    assert run(source, out, 3, force=True) == 3
    assert run(source, out) == 7
    complete(source, out)


def test_an_output_of_no_job_is_never_replaced(source: Path, out: Path) -> None:
    out.parent.mkdir()
    out.write_text("mine")
    for force, words in ((False, "already exists: choose another"), (True, "no pastkey batch wrote it")):
        with pytest.raises(ExistingFolderError, match=words):
            refuse_output(out, force=force)
        with pytest.raises(ExistingFolderError, match=words):
            run(source, out, force=force)
    assert out.read_text() == "mine"
    assert not job_folder(out).exists()


def test_a_file_that_came_meanwhile_is_not_replaced(source: Path, out: Path) -> None:
    run(source, out, 3)
    out.write_text("mine")
    with pytest.raises(ExistingFolderError, match="already exists"):
        run(source, out)
    assert out.read_text() == "mine"


def test_places_that_cannot_be_are_told(source: Path, out: Path) -> None:
    with pytest.raises(InputError, match=r"lies under .*, which is a file"):
        refuse_output(source / "out.jsonl", force=False)
    with pytest.raises(InputError, match="is a folder; a file was expected"):
        refuse_output(source.parent, force=True)
    with pytest.raises(InputError, match="is the input"):
        require_formats(source, source)
    with pytest.raises(InputError, match=r"holds JSON lines, and so will the output: name it out\.jsonl"):
        require_formats(source, source.parent / "out.parquet")


def test_a_parquet_output_is_named_so(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path = tmp_path / "rows.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"prompt": ["a"]}), path)
    require_formats(path, tmp_path / "out.parquet")
    with pytest.raises(InputError, match=r"is a Parquet file, and so will the output be: name it out\.parquet"):
        require_formats(path, tmp_path / "out.jsonl")


def test_two_rows_of_one_id_are_refused(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"id": 1}, {"id": "1"}, "bad", {"custom_id": 1}])
    with pytest.raises(InputError, match="has the id 1 twice, in rows 1 and 4"):
        counted_ids(source)


def test_a_job_of_two_processes_at_once_is_refused(source: Path, out: Path) -> None:
    with open_job(source, out, wanted(source)) as job:
        answer(job, 2)
        with pytest.raises(InUseError, match=rf"is being written by process {os.getpid()}: wait"):
            run(source, out, force=True)
    assert run(source, out) == 8


def test_shards_have_each_row_once(source: Path, out: Path) -> None:
    found: list[int] = []
    for part in (1, 2, 3):
        place = out.with_name(f"{part}.jsonl")
        assert run(source, place, shard=f"{part}/3") == counted_ids(source, f"{part}/3")
        ids = [row["id"] for row in read_rows(place)]
        assert ids == [*range(part - 1, 10, 3)]
        found += ids
    assert sorted(found) == [*range(10)]


def test_an_input_that_changes_meanwhile_is_told(source: Path, out: Path) -> None:
    with open_job(source, out, wanted(source)) as job:
        answer(job)
        write_rows(source, plain_rows(11))
        with pytest.raises(InputError, match="was changed while the job ran"):
            job.finish({})
    assert not out.exists()


def test_a_full_disk_at_the_end_keeps_the_answers(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: JsonLines, file: IO[bytes], *_: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "write", full)
        with pytest.raises(ResourceError, match=r"the disk is full: .*out\.jsonl"):
            run(source, out)
    assert sorted(path.name for path in job_folder(out).iterdir()) == ["job.json", "rows.jsonl"]
    assert run(source, out) == 0
    complete(source, out)


def test_a_kill_between_the_output_and_its_report_is_made_good(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            module, "sync_folder", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt) if out.exists() else None
        )
        with pytest.raises(KeyboardInterrupt):
            run(source, out)
    assert out.exists()
    assert run(source, out) == 0
    complete(source, out)


def test_what_kills_left_in_the_folder_goes(source: Path, out: Path) -> None:
    run(source, out, 2)
    (job_folder(out) / ".out.0123.partial").write_text("x")
    (job_folder(out) / ".job.json.0123.new").write_text("x")
    run(source, out)
    complete(source, out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, "has job format version 2; this pastkey reads up to 1: upgrade pastkey"),
        ({"settings": 3}, "is not valid: settings is 3; it must be an object; begin"),
        ({"more": 3}, "is not valid: the content has an unknown key 'more'"),
    ],
)
def test_a_record_that_was_altered_is_told(source: Path, out: Path, change: dict[str, Any], words: str) -> None:
    run(source, out, 2)
    file = job_folder(out) / "job.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(IntegrityError, match=re.escape(words)):
        run(source, out)

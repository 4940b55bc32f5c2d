"""A job: a file of rows whose answers are appended to another, and which continues after a kill.

    OUT        a line for each answered row, in the order in which they ended
    OUT.job    the settings that the job was begun with

The ids in OUT are the state of the job. A process writes OUT while it holds the lock of it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from pastkey.errors import ExistingFolderError, InputError, IntegrityError
from pastkey.files.durable import lock_file, refuse_below_a_file, refuse_special, sync_folder, write_json
from pastkey.files.folder import read_json, sha256
from pastkey.files.reading import parse_json
from pastkey.values import shown

from .rows import Answer, Row, RowId, answered_line, is_id, read_rows

FORMAT_VERSION = 1
_ANEW = "begin anew with --force"


def job_file(out: Path) -> Path:
    """The file with the settings that the output was begun with."""
    return out.with_name(f"{out.name}.job")


def shard_ids(source: Path, shard: str) -> set[RowId]:
    """The ids of the shard "I/N", every N-th row from the I-th on, or of all rows for "".

    Raises InputError for another shard, and where two rows of the file have one id.
    """
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard or "1/1")
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise InputError(f"--shard is {shard!r}; I/N was expected, with I from 1 to N")
    lines: dict[RowId, int] = {}
    for row in read_rows(source):
        if row.id in lines:
            raise InputError(
                f"{source} has the id {shown(row.id)} twice, in lines {lines[row.id]} and {row.number}: an answer is "
                "known by its row's id, so give each its own"
            )
        lines[row.id] = row.number
    return {identity for identity, number in lines.items() if number % parts == part % parts}


def refuse_output(out: Path, source: Path) -> None:
    """Raises where a job may not write its output. Call it before long work.

    Raises InputError for the input itself, a folder, a device, or a place below a file; ExistingFolderError for a file
    that holds something and that no job wrote.
    """
    refuse_below_a_file(out)
    refuse_special(out)
    if out.is_dir():
        raise InputError(f"{out} is a folder; a file was expected")
    if not out.exists():
        return
    if out.samefile(source):
        raise InputError(f"{out} is the input: choose another --out")
    if out.stat().st_size and not job_file(out).exists():
        raise ExistingFolderError(
            f"{out} already exists and pastkey batch did not write it (there is no {job_file(out)}): choose another "
            "--out"
        )


class Job:
    """A job that is open. Made by `open_job`.

    Attributes:
        total: How many rows there are.
        done: How many of them are answered.
        errors: How many of these answers are errors.
    """

    def __init__(self, source: Path, out: Path, file: FileIO, ids: set[RowId]) -> None:
        """`file`: the output, open for appending."""
        self._source, self._out, self._file = source, out, file
        self._left, self.total, self.errors = set(ids), len(ids), 0

    @property
    def done(self) -> int:
        return self.total - len(self._left)

    def rows(self) -> Iterator[Row]:
        """Those that are not answered, in order."""
        return (row for row in read_rows(self._source) if row.id in self._left)

    def add(self, row: Row, answer: Answer) -> None:
        """Appends an answer. Raises OSError where it cannot be written."""
        line = memoryview(answered_line(row, answer))
        while line:
            line = line[self._file.write(line) :]
        self._note(row.id, answer)

    def _note(self, identity: RowId, answer: Mapping[str, Any]) -> None:
        self._left.discard(identity)
        self.errors += answer.get("error") is not None

    def begin(self, wanted: Mapping[str, Any]) -> None:
        """Empties the output, then writes the job file. After a kill in between, the job begins again."""
        self._file.truncate(0)
        os.fsync(self._file.fileno())
        write_json(job_file(self._out), wanted)
        sync_folder(self._out.absolute().parent)

    def resume(self) -> None:
        """Reads the ids of the output, and cuts it off at the first line that is not whole.

        Raises IntegrityError for a whole line that is not an answer.
        """
        end = 0
        with self._out.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") or b"\0" in line:  # a power cut may leave zeros where a file grew
                    break
                found = parse_json(line, f"line {number} of {self._out}")
                if not (isinstance(found, dict) and is_id(found.get("id"))):
                    raise IntegrityError(f"line {number} of {self._out} holds no answer: it was altered; {_ANEW}")
                self._note(found["id"], found)
                end += len(line)
        self._file.truncate(end)


@contextlib.contextmanager
def open_job(
    source: Path, out: Path, ids: set[RowId], wanted: Mapping[str, Any], *, force: bool = False
) -> Iterator[Job]:
    """Begins a job, or continues one.

    Args:
        source: The file of rows.
        out: The output.
        ids: Those of the rows to answer.
        wanted: The settings of the answers, in addition to the rows' own: names and values of JSON's types.
        force: Whether to begin anew.

    Raises:
        InputError: The job was begun with something else, or the input has changed at the end of the block.
        InUseError: Another process writes there.
        IntegrityError: The written part of the job was altered.
        ExistingFolderError: The output holds something that no job wrote.
        OSError: It cannot be written.
    """
    refuse_output(out, source)
    wanted = {"format_version": FORMAT_VERSION, "input": sha256(source), **wanted}
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("ab", buffering=0) as file:
        lock_file(file.fileno(), out)
        refuse_output(out, source)
        job = Job(source, out, file, ids)
        if force or not out.stat().st_size:
            job.begin(wanted)
        else:
            _require_same(read_json(job_file(out)), wanted, out)
            job.resume()
        yield job
        os.fsync(file.fileno())
        if sha256(source) != wanted["input"]:
            raise InputError(f"{source} was changed while the job ran: {_ANEW}")


def _require_same(found: Mapping[str, Any], wanted: Mapping[str, Any], out: Path) -> None:
    """Raises InputError where a job was begun with something else: its answers would not be of one kind."""
    for name in sorted({*found, *wanted}):
        before, now = found.get(name), wanted.get(name)
        if before != now:
            raise InputError(
                f"{out} belongs to a job with {name} {shown(before, 40)}, and now it is {shown(now, 40)}: "
                f"give the same, choose another --out, or {_ANEW}"
            )

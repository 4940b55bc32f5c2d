"""One job over a file of rows: what it was begun with, which rows are answered, and the output at its end.

    OUT                  at the end, whole: the rows in the order of the input
    OUT.job/job.json     what the job was begun with, and its report when it has ended
    OUT.job/rows.jsonl   the answers so far: a Journal, until OUT is there
    OUT.job/lock         while a process writes

A job that was ended in the middle goes on by the same command: what the journal has is not answered again.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pastkey.errors import ExistingFolderError, InputError, IntegrityError
from pastkey.folder import read_json, refuse_below_a_file, sha256, write_json
from pastkey.lock import locked
from pastkey.replace import sync_folder
from pastkey.typed import Natural, Size, parse
from pastkey.values import is_int, shown
from pastkey.version import __version__

from .answers import Answer
from .generator import Row
from .journal import Journal, disk_error
from .requests import RowId
from .tables import SUFFIX, Entry, ParquetTable, open_table

FORMAT_VERSION = 1
_AGAIN = "give the same, choose another --out, or begin anew with --force"


@dataclass(frozen=True)
class JobRecord:
    """job.json."""

    bundle: str  # the hash of its files' hashes
    input: str  # the sha256 of the file
    shard: str  # "1/4", or "" for all rows
    settings: Mapping[str, Any]
    created: Natural  # seconds since 1970
    replaces: bool  # whether an output was there that it is to replace
    pastkey_version: str = __version__
    format_version: Size = FORMAT_VERSION
    report: Mapping[str, Any] | None = None  # of a job that has ended


def job_folder(out: Path) -> Path:
    """The folder that goes with an output."""
    return out.with_name(f"{out.name}.job")


def is_begun(out: Path) -> bool:
    """Whether a job was begun that writes this output, or has written it."""
    return (job_folder(out) / "job.json").is_file()


class Job:
    """A job that is open. Made by `open_job`.

    Attributes:
        record: What it was begun with. It has a report where the job has ended before.
        total: How many rows there are.
    """

    def __init__(self, source: Path, out: Path, record: JobRecord, total: int, journal: Journal) -> None:
        self.record, self.total = record, total
        self._source, self._out, self._journal = source, out, journal
        self._table = open_table(source)

    @property
    def done(self) -> int:
        """How many rows are answered."""
        return len(self._journal)

    @property
    def errors(self) -> int:
        """How many of these answers are errors."""
        return self._journal.errors

    def rows(self) -> Iterator[Row]:
        """Those that are not answered, in order."""
        for entry in self._table.entries():
            if in_shard(entry.number, self.record.shard) and entry.id not in self._journal:
                yield Row(entry.id, entry.id, entry.content)

    def add(self, identity: RowId, answer: Answer) -> None:
        """Takes an answer. Raises ResourceError or OSError where it cannot be written."""
        self._journal.add(identity, answer)

    def finish(self, report: Mapping[str, Any]) -> None:
        """Writes the output and the report, when every row is answered.

        Raises InputError where the input has changed meanwhile; ResourceError or OSError where it cannot be written,
        and then the same command tries again.
        """
        self._journal.sync()
        if sha256(self._source) != self.record.input:
            raise InputError(f"{self._source} was changed while the job ran: begin anew with --force")
        folder = job_folder(self._out)
        partial = folder / f".out.{secrets.token_hex(4)}.partial"
        try:
            with partial.open("xb") as written:
                self._table.write(written, self._answer, sorted(self._journal.further))
                written.flush()
                os.fsync(written.fileno())
            partial.replace(self._out)
        except OSError as error:
            raise disk_error(error, self._out) from None
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        sync_folder(self._out.parent)
        write_json(folder / "job.json", asdict(self.record) | {"report": dict(report)})

    def _answer(self, entry: Entry) -> Answer | None:
        return self._journal[entry.id] if in_shard(entry.number, self.record.shard) else None


@contextlib.contextmanager
def open_job(source: Path, out: Path, wanted: JobRecord, *, force: bool = False) -> Iterator[Job]:
    """Begins a job, or goes on with one. At the end of the block what was answered is on the disk.

    Args:
        source: The file of rows.
        out: The output.
        wanted: What the job is to be; `created` and `replaces` are those of the first time.
        force: Whether to begin anew.

    Raises:
        InputError: Two rows have one id; or the job was begun with something else.
        InUseError: Another process writes there.
        IntegrityError: What was written of the job was altered.
        ExistingFolderError: The output is there, and is of no job, or `force` is not given.
    """
    total = counted_ids(source, wanted.shard)
    folder = job_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    try:
        with locked(folder, out, "being written"):
            for path in folder.glob(".*"):
                if path.name.endswith((".new", ".partial")):  # of a process that was killed
                    path.unlink()
            record, journal = _begun(folder, out, wanted, force=force), folder / "rows.jsonl"
            with Journal(journal) as answers:
                if record.report is None and os.path.lexists(out) and not record.replaces and len(answers) < total:
                    raise _existing(out)
                job = Job(source, out, record, total, answers)
                yield job
            if read_record(folder / "job.json").report is not None:
                journal.unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):  # it holds something, as it mostly does
            folder.rmdir()


def _begun(folder: Path, out: Path, wanted: JobRecord, *, force: bool) -> JobRecord:
    """The record of the job that goes on, or a new one. With the lock held."""
    file = folder / "job.json"
    found = read_record(file) if file.exists() else None
    if found is not None and not force:
        require_same(found, wanted, out)
        if found.report is None or out.exists():
            return found
    refuse_output(out, force=force or found is not None)
    (folder / "rows.jsonl").unlink(missing_ok=True)
    record = JobRecord(**(asdict(wanted) | {"created": int(time.time()), "replaces": os.path.lexists(out)}))
    write_json(file, asdict(record))
    sync_folder(folder)
    sync_folder(out.parent)
    return record


def refuse_output(out: Path, *, force: bool) -> None:
    """Raises where a job may not write its output: what no job wrote is never replaced. Call it before long work.

    Raises InputError for a folder or a place below a file, ExistingFolderError for a file.
    """
    refuse_below_a_file(out)
    if out.is_dir():
        raise InputError(f"{out} is a folder; a file was expected")
    if not os.path.lexists(out):
        return
    ours = is_begun(out)
    if not force and not ours:
        raise _existing(out)
    if not ours:
        raise ExistingFolderError(
            f"{out} exists and no pastkey batch wrote it (there is no {job_folder(out)}), so --force does not replace "
            "it: choose another --out"
        )


def _existing(out: Path) -> ExistingFolderError:
    return ExistingFolderError(f"{out} already exists: choose another --out, or replace it with --force")


def require_formats(source: Path, out: Path) -> None:
    """Raises InputError where the output's name says another format than the input's, or is the input's."""
    parquet = isinstance(open_table(source), ParquetTable)
    if out.suffix == SUFFIX and not parquet:
        raise InputError(f"{source} holds JSON lines, and so will the output: name it {out.with_suffix('.jsonl').name}")
    if out.suffix != SUFFIX and parquet:
        raise InputError(
            f"{source} is a Parquet file, and so will the output be: name it {out.with_suffix(SUFFIX).name}"
        )
    if out.exists() and out.samefile(source):
        raise InputError(f"{out} is the input: choose another --out")


def read_record(file: Path) -> JobRecord:
    """job.json. Raises IntegrityError where it is not valid."""
    content = read_json(file)
    version = content.get("format_version")
    if is_int(version, FORMAT_VERSION + 1, 2**31 - 1):
        raise IntegrityError(
            f"{file} has job format version {version}; this pastkey reads up to {FORMAT_VERSION}: upgrade pastkey"
        )
    try:
        return parse(JobRecord, content)
    except InputError as error:
        raise IntegrityError(f"{file} is not valid: {error}; begin the job anew with --force") from None


def require_same(found: JobRecord, wanted: JobRecord, out: Path) -> None:
    """Raises InputError where a job was begun with something else: its rows would not be of one kind."""
    for name, what in (("bundle", "another bundle"), ("input", "other rows"), ("shard", "another --shard")):
        if getattr(found, name) != getattr(wanted, name):
            raise InputError(f"{out} is of a job that was begun with {what}: {_AGAIN}")
    for name in sorted({*found.settings, *wanted.settings}):
        before, now = found.settings.get(name), wanted.settings.get(name)
        if before != now:
            raise InputError(
                f"{out} is of a job that was begun with {name} {shown(before)}, and now it is {shown(now)}: {_AGAIN}"
            )


def in_shard(number: int, shard: str) -> bool:
    """Whether a row, counted from 1, is of the shard "I/N": each N-th, from the I-th on. All are of ""."""
    part, parts = map(int, (shard or "1/1").split("/"))
    return number % parts == part % parts


def counted_ids(source: Path, shard: str = "") -> int:
    """How many rows there are. Raises InputError where two of the file have one id."""
    seen: dict[RowId, int] = {}
    for entry in open_table(source).entries():
        if entry.id in seen:
            raise InputError(
                f"{source} has the id {shown(entry.id)} twice, in rows {seen[entry.id]} and {entry.number}: an answer "
                "is known by its row's id, so give each its own"
            )
        seen[entry.id] = entry.number
    return sum(in_shard(number, shard) for number in seen.values())

"""The answers so far: a file that only grows, from which a kill takes nothing but what was not synced.

Each line is {"id": ..., "answer": {...}}. Lines are written together and synced before more are. What a kill tore at
the end is cut off when the file is opened again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from pastkey.errors import IntegrityError, ResourceError
from pastkey.reading import parse_json

from .answers import Answer
from .requests import FURTHER, RowId, is_id
from .tables import json_line

CHUNK_ROWS = 64  # that are written and synced together
CHUNK_SECONDS = 2.0  # after which fewer are


class Journal:
    """The file of a job's answers. One process at a time.

    Attributes:
        further: Which of FURTHER some answer has.
        errors: How many answers are errors.
    """

    def __init__(self, path: Path) -> None:
        """Opens it, or makes it. Raises IntegrityError where it holds what no job wrote, ResourceError, OSError."""
        self.path = path
        self.further: set[str] = set()
        self.errors = 0
        self._places: dict[RowId, tuple[int, int]] = {}  # id -> offset and length of its line
        self._waiting: list[tuple[RowId, bytes]] = []
        self._synced = time.monotonic()
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        self._file = os.open(path, flags, 0o666)
        try:
            self._end = self._read()
            if self._end < os.fstat(self._file).st_size:
                os.ftruncate(self._file, self._end)
                os.fsync(self._file)
        except BaseException:
            os.close(self._file)
            raise

    def __len__(self) -> int:
        return len(self._places) + len(self._waiting)

    def __contains__(self, identity: RowId) -> bool:
        """Whether a row was written."""
        return identity in self._places

    def __getitem__(self, identity: RowId) -> Answer:
        """What was written of a row. Raises KeyError."""
        start, length = self._places[identity]
        os.lseek(self._file, start, os.SEEK_SET)
        return self._parsed(os.read(self._file, length), start)[1]

    def add(self, identity: RowId, answer: Answer) -> bool:
        """Takes an answer; returns whether it, and those before, were written. Raises ResourceError, OSError."""
        assert identity not in self._places
        self._waiting.append((identity, json_line({"id": identity, "answer": answer})))
        self._note(answer)
        if len(self._waiting) < CHUNK_ROWS and time.monotonic() - self._synced < CHUNK_SECONDS:
            return False
        self.sync()
        return True

    def sync(self) -> None:
        """Writes what waits, on the disk itself. Raises ResourceError, OSError: then nothing of it is there."""
        if not self._waiting:
            return
        content = memoryview(b"".join(line for _, line in self._waiting))
        try:
            os.lseek(self._file, self._end, os.SEEK_SET)
            while content:
                content = content[os.write(self._file, content) :]
            os.fsync(self._file)
        except OSError as error:
            self._cut()
            raise disk_error(error, self.path) from None
        except BaseException:
            self._cut()
            raise
        written, self._waiting = self._waiting, []  # before all else: an interrupt must not have them written twice
        for identity, line in written:
            self._places[identity] = (self._end, len(line))
            self._end += len(line)
        self._synced = time.monotonic()

    def _cut(self) -> None:
        """Takes back what was half written; where that fails, the next opening does."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Writes what waits, whatever interrupts the job. An error of its own does not hide that one."""
        try:
            with contextlib.suppress(OSError) if kind is not None else contextlib.nullcontext():
                self.sync()
        finally:
            os.close(self._file)

    # --- opening ------------------------------------------------------------------------------------------------------
    def _read(self) -> int:
        """Takes note of all lines that are whole. Returns where they end."""
        end = 0
        for line in self._lines():
            # A power cut may leave a hole where a file grew; no line that was written holds a NUL.
            if not line.endswith(b"\n") or b"\0" in line:
                break
            identity, answer = self._parsed(line, end)
            if identity in self._places:
                raise IntegrityError(f"{self.path} has the row {identity!r} twice: it was altered; {_ANEW}")
            self._places[identity] = (end, len(line))
            self._note(answer)
            end += len(line)
        return end

    def _lines(self) -> Iterator[bytes]:
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            yield from file

    def _parsed(self, line: bytes, start: int) -> tuple[RowId, Answer]:
        content = parse_json(line, f"{self.path}, at byte {start},")
        if not (isinstance(content, dict) and is_id(content.get("id")) and isinstance(content.get("answer"), dict)):
            raise IntegrityError(f"{self.path} holds no answer at byte {start}: it was altered; {_ANEW}")
        return content["id"], content["answer"]

    def _note(self, answer: Answer) -> None:
        self.errors += answer.get("error") is not None
        self.further.update(name for name in FURTHER if name in answer)


_ANEW = "begin the job anew with --force"


def disk_error(error: OSError, path: Path) -> OSError:
    """A full disk in a sentence, any other error as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return ResourceError(
        f"the disk is full: {path} could not be written; what was answered before is kept: free some space, and the "
        "same command goes on"
    )

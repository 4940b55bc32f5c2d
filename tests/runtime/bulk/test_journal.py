"""The file of answers: what was synced is there, what was torn is not, and nothing is there twice."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from pastkey.errors import IntegrityError, ResourceError
from pastkey.runtime.bulk import journal as module
from pastkey.runtime.bulk.journal import CHUNK_ROWS, Journal


def answer(text: object) -> dict[str, Any]:
    return {"text": str(text), "error": None}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time passes, so that rows are written by their number alone."""
    monkeypatch.setattr(module.time, "monotonic", lambda: 0.0)


def test_answers_are_there_again_with_their_faults_counted(path: Path) -> None:
    with Journal(path) as journal:
        journal.add(1, answer("é\0\n"))
        journal.add("1", {"text": None, "error": "bad", "tool_calls": []})
        assert len(journal) == 2
        assert (journal.errors, journal.further) == (1, {"tool_calls"})
    with Journal(path) as journal:
        assert (len(journal), journal.errors, journal.further) == (2, 1, {"tool_calls"})
        assert journal[1] == answer("é\0\n")
        assert journal["1"]["error"] == "bad"
        assert [identity in journal for identity in (1, "1", 2)] == [True, True, False]
        with pytest.raises(KeyError):
            journal[2]


def test_answers_are_written_by_chunks(path: Path, still: None) -> None:
    with Journal(path) as journal:
        for number in range(CHUNK_ROWS - 1):
            assert not journal.add(number, answer(number))
        assert path.stat().st_size == 0
        assert journal.add(CHUNK_ROWS, answer("last"))
        assert path.read_bytes().count(b"\n") == CHUNK_ROWS
        journal.add("waits", answer(""))
        assert "waits" not in journal


def test_answers_are_written_after_a_while(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Journal(path) as journal:
        assert not journal.add(1, answer(1))
        now[0] = module.CHUNK_SECONDS
        assert journal.add(2, answer(2))
        assert not journal.add(3, answer(3))


@pytest.mark.parametrize(
    "torn",
    [b'{"id":9,"answer":{"text":"', b"\0" * 40, b"\0\0\0\n" + b'{"id":8,"answer":{}}\n', b'{"id":9,"answer":{}}'],
)
def test_what_was_torn_is_cut_off(path: Path, torn: bytes) -> None:
    with Journal(path) as journal:
        journal.add(1, answer(1))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with Journal(path) as journal:
        assert path.read_bytes() == whole
        assert len(journal) == 1
        journal.add(2, answer(2))
    assert path.read_bytes().startswith(whole)
    with Journal(path) as journal:
        assert (journal[1], journal[2]) == (answer(1), answer(2))


def test_a_file_that_is_cut_anywhere_keeps_what_is_whole(path: Path) -> None:
    with Journal(path) as journal:
        for number in range(5):
            journal.add(number, answer("é" * number))
    content = path.read_bytes()
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        with Journal(path) as journal:
            assert len(journal) == content[:end].count(b"\n")
            assert all(journal[number] == answer("é" * number) for number in range(len(journal)))


@pytest.mark.parametrize("line", [b"x\n", b"3\n", b'{"id":1.5,"answer":{}}\n', b'{"id":1,"answer":3}\n', b"\xff\n"])
def test_a_file_that_was_altered_is_refused(path: Path, line: bytes) -> None:
    path.write_bytes(line)
    with pytest.raises(IntegrityError):
        Journal(path)
    assert path.read_bytes() == line


def test_a_row_that_is_there_twice_is_refused(path: Path) -> None:
    path.write_bytes(b'{"id":1,"answer":{}}\n' * 2)
    with pytest.raises(IntegrityError, match="has the row 1 twice"):
        Journal(path)


def test_a_full_disk_is_told_and_leaves_nothing_half(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def full(file: int, content: bytes) -> int:
        write(file, bytes(content[:7]))
        raise OSError(errno.ENOSPC, "no space")

    with Journal(path) as journal:
        journal.add(1, answer(1))
        journal.sync()
        journal.add(2, answer(2))
        with monkeypatch.context() as patch:
            patch.setattr(module.os, "write", full)
            with pytest.raises(ResourceError, match=r"the disk is full: .*the same command goes on"):
                journal.sync()
        assert path.read_bytes().count(b"\n") == 1
    with Journal(path) as journal:
        assert len(journal) == 2  # there was room again at the end


def test_a_disk_that_fails_once_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is written at the end."""
    fsync, calls = os.fsync, [0]

    def once(file: int) -> None:
        calls[0] += 1
        if calls[0] == 1:
            raise OSError(errno.EIO, "broken")
        fsync(file)

    monkeypatch.setattr(module.os, "fsync", once)
    with Journal(path) as journal:
        journal.add(1, answer(1))
        with pytest.raises(OSError, match="broken"):
            journal.sync()
    with Journal(path) as journal:
        assert journal[1] == answer(1)


def test_an_interrupt_at_any_call_writes_each_row_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in range(4):
        path.unlink(missing_ok=True)
        calls = [0]

        def interrupted(call: Any, place: int = place, calls: list[int] = calls) -> Any:
            def run(*arguments: Any) -> Any:
                found = call(*arguments)
                calls[0] += 1
                if calls[0] == place:
                    raise KeyboardInterrupt
                return found

            return run

        with monkeypatch.context() as patch:
            for name in ("write", "fsync", "lseek"):
                patch.setattr(module.os, name, interrupted(getattr(os, name)))
            try:
                with Journal(path) as journal:
                    journal.add(1, answer(1))
                    journal.add(2, answer(2))
                    journal.sync()
            except KeyboardInterrupt:
                pass
        with Journal(path) as journal:
            assert (journal[1], journal[2]) == (answer(1), answer(2))

"""Files and folders are whole or not there, what dead processes left goes, and a lock ends with its process."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pastkey.errors import ExistingFolderError, InputError, InUseError
from pastkey.files import durable as module
from pastkey.files.durable import (
    STEPS,
    exchange,
    locked,
    refuse_existing,
    remove_leftovers,
    resumable_bytes,
    sync_folder,
    sync_tree,
    whole_file,
    whole_folder,
    write_json,
)
from pastkey.files.folder import read_json


def test_a_folder_appears_whole(tmp_path):
    with whole_folder(tmp_path / "deep" / "out") as work:
        (work / "a").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "a").read_text() == "a"


def test_nothing_stays_of_one_that_failed(tmp_path):
    def write_until_the_disk_is_full() -> None:
        with whole_folder(tmp_path / "out") as work:
            (work / "a").write_text("a")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_until_the_disk_is_full()
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_what_pastkey_wrote_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(ExistingFolderError, match="did not write it"), whole_folder(out, force=True):
        pass
    write_json(out / "pastkey.json", {})
    with whole_folder(out, force=True) as work:
        (work / "new").write_text("new")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def made(path: Path, name: str = "") -> Path:
    """A folder of pastkey's that says how it was called."""
    path.mkdir()
    write_json(path / "pastkey.json", {"name": name or path.name})
    return path


def name_of(path: Path) -> str:
    found = read_json(path / "pastkey.json")["name"]
    assert isinstance(found, str)
    return found


def replace(out: Path) -> None:
    with whole_folder(out, force=True) as work:
        write_json(work / "pastkey.json", {"name": "new"})


def failing(monkeypatch: pytest.MonkeyPatch, numbers: set[int], error: BaseException | None = None) -> None:
    """Where there is no exchange, lets the renames of these numbers fail."""
    rename, done = Path.rename, 0

    def counted(path: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done in numbers:
            raise error or OSError(errno.EIO, "broken")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", counted)
    monkeypatch.setattr(module, "exchange", lambda one, other: False)


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux' own")
def test_two_names_are_exchanged(tmp_path):
    assert exchange(made(tmp_path / "one"), made(tmp_path / "other"))
    assert (name_of(tmp_path / "one"), name_of(tmp_path / "other")) == ("other", "one")
    with pytest.raises(FileNotFoundError, match="none"):
        exchange(tmp_path / "one", tmp_path / "none")


def test_where_names_cannot_be_exchanged_two_renames_do_it(tmp_path, monkeypatch):
    out = made(tmp_path / "out")
    failing(monkeypatch, set())
    replace(out)
    assert name_of(out) == "new"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("broken", [1, 2])
def test_a_rename_that_fails_or_is_interrupted_leaves_the_old_one(broken, error, tmp_path, monkeypatch):
    out = made(tmp_path / "out")
    failing(monkeypatch, {broken}, error)
    with pytest.raises(type(error)):
        replace(out)
    assert name_of(out) == "out"
    assert list(tmp_path.iterdir()) == [out]


def test_what_could_not_be_put_back_is_put_back_by_the_next(tmp_path, monkeypatch):
    """As after a kill between the two renames."""
    out = made(tmp_path / "out")
    with monkeypatch.context() as patch:
        failing(patch, {2, 3})
        with pytest.raises(OSError, match="broken"):
            replace(out)
    assert not out.exists()
    remove_leftovers(out)
    assert name_of(out) == "out"
    assert list(tmp_path.iterdir()) == [out]


def test_a_disk_that_does_not_take_the_files_is_told_before_anything_is_replaced(tmp_path, monkeypatch):
    out = made(tmp_path / "out")

    def write() -> None:
        with whole_folder(out, force=True) as work:
            (work / "a").write_text("a")
            monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))

    with pytest.raises(OSError, match="broken"):
        write()
    assert name_of(out) == "out"
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_and_all_below_it_is_put_on_the_disk(tmp_path, monkeypatch):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)
    sync_tree(tmp_path)
    assert len(synced) == 5
    sync_folder(tmp_path / "none")  # a system that opens no folders


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_another_process_made_meanwhile_is_refused_or_replaced(force, tmp_path):
    out = tmp_path / "out"

    def write() -> None:
        with whole_folder(out, force=force) as work:
            write_json(work / "pastkey.json", {"by": "us"})
            out.mkdir()
            write_json(out / "pastkey.json", {"by": "another"})

    with contextlib.nullcontext() if force else pytest.raises(ExistingFolderError, match="already exists"):
        write()
    assert read_json(out / "pastkey.json") == {"by": "us" if force else "another"}
    assert list(tmp_path.iterdir()) == [out]


def test_force_replaces_a_link_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "v1").mkdir()
    write_json(tmp_path / "v1" / "pastkey.json", {"v": 1})
    (tmp_path / "current").symlink_to("v1")
    with whole_folder(tmp_path / "current", force=True) as work:
        write_json(work / "pastkey.json", {"v": 2})
    assert read_json(tmp_path / "current" / "pastkey.json") == {"v": 2}
    assert read_json(tmp_path / "v1" / "pastkey.json") == {"v": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "v1"]


def test_json_that_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, {"a": float("nan")})
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        write_json(file, {"a": 2})
    assert read_json(file) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_has_the_mode_that_the_umask_leaves(tmp_path):
    before = os.umask(0o022)
    try:
        for mode in (0o666, 0o600):
            with whole_file(tmp_path / "a", mode=mode) as file:
                file.write(b"a")
            assert (tmp_path / "a").stat().st_mode & 0o777 == mode & 0o755
        with whole_folder(tmp_path / "b"):
            pass
        assert (tmp_path / "b").stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(before)


# --- what dead processes left, and locks --------------------------------------------------------------------------
HOLD = """
import sys, time
from pathlib import Path
from pastkey.files.durable import whole_file, whole_folder
with whole_folder(Path(sys.argv[1])) as work, whole_file(Path(sys.argv[1] + ".json")) as file:
    print(work, flush=True)
    time.sleep(60)
"""
needs_locks = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")


@pytest.fixture
def living(tmp_path):
    """A process that writes the folder out and the file out.json, and where it fills the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        work = Path(process.stdout.readline().strip())
        yield process, work
        process.kill()


@needs_locks
def test_what_a_process_left_goes_with_the_next_when_it_is_dead(living, tmp_path):
    process, work = living
    others = [tmp_path / name for name in (".out.else.0123abcd.partial", ".out.0123.partial", ".in.0123abcd.old")]
    for other in others:
        other.mkdir()
    replace(tmp_path / "out")
    write_json(tmp_path / "out.json", {"a": 1})
    assert work.is_dir()
    assert len(list(tmp_path.iterdir())) == len(others) + 4
    process.send_signal(signal.SIGKILL)
    process.wait()
    replace(tmp_path / "out")
    write_json(tmp_path / "out.json", {"a": 1})
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "out", tmp_path / "out.json"])


@needs_locks
def test_a_folder_that_another_process_writes_is_refused_until_that_dies(living, tmp_path):
    """The lock follows the folder: that of a checkpoint is the one that its run has held from the beginning."""
    process, work = living
    write_json(work / "pastkey.json", {})
    out = work.rename(tmp_path / "there")
    with pytest.raises(InUseError, match="there is being written by another process: wait"), locked(out):
        pass
    with pytest.raises(InUseError):
        refuse_existing(out, force=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    refuse_existing(out, force=True)


@needs_locks
def test_without_locks_nothing_is_refused_and_nothing_removed(tmp_path, monkeypatch):
    import fcntl

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    left = tmp_path / ".out.0123abcd.partial"
    left.mkdir()
    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path), locked(tmp_path), locked(tmp_path / "none"):
        replace(tmp_path / "out")
    assert left.exists()


def test_a_folder_under_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="which is a file"), whole_folder(tmp_path / "file" / "out"):
        pass


# --- resuming -----------------------------------------------------------------------------------------------------
def test_a_folder_with_steps_is_gone_on_with_and_left_by_a_failure(tmp_path):
    out, left = tmp_path / "out", tmp_path / ".out.0123abcd.partial"
    (left / STEPS).mkdir(parents=True)
    with contextlib.suppress(ZeroDivisionError), whole_folder(out, resume=True) as work:
        assert work == left
        raise ZeroDivisionError
    assert (left / STEPS).is_dir()
    (left / "a").write_text("1234")
    assert resumable_bytes(out) == 4
    with whole_folder(out, resume=True) as work:
        assert work == left
        (work / "a").unlink()
        (work / STEPS).rmdir()
        (work / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # One without steps is removed.
    (tmp_path / ".other.00000000.partial").mkdir()
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "other", resume=True):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_a_living_process_fills_is_not_taken_over(tmp_path):
    left = tmp_path / ".out.0123abcd.partial"
    (left / STEPS).mkdir(parents=True)
    with locked(left), whole_folder(tmp_path / "out", resume=True) as work:
        assert work != left
    assert left.exists()
    assert remove_leftovers(tmp_path / "other") is False
    assert remove_leftovers(tmp_path / "out") is True
    assert not left.exists()

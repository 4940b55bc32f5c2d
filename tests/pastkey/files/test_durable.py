"""Files and folders are whole or absent, leftovers of dead processes are removed, and a lock ends with its process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pastkey.errors import ExistingFolderError, InputError, InUseError
from pastkey.files import durable as module
from pastkey.files.durable import locked, refuse_existing, whole_folder, write_json
from pastkey.files.folder import read_json

from ...crash import Killed, at_every_operation


def made(path: Path, name: str = "") -> Path:
    """A folder of pastkey's that says how it was called."""
    path.mkdir()
    write_json(path / "pastkey.json", {"name": name or path.name})
    return path


def name_of(path: Path) -> str:
    found = read_json(path / "pastkey.json" if path.is_dir() else path)["name"]
    assert isinstance(found, str)
    return found


def replace(out: Path) -> None:
    with whole_folder(out, force=True) as work:
        (work / "deep").mkdir()
        (work / "deep" / "a").write_text("a")
        write_json(work / "pastkey.json", {"name": "new"})


def replace_file(out: Path) -> None:
    write_json(out, {"name": "new"})


# --- ended at any operation ---------------------------------------------------------------------------------------
FILE = ["open", "fsync", "replace"]
FILLED = [*3 * ["mkdir"], *FILE, *4 * ["fsync"]]  # its parent, itself and its content; two files and two folders
FOLDER = [*FILLED, *3 * ["rename"], "fsync", "unlink", "rmdir"]  # the flush of its parent; the old one
NEW = [*FILLED, "rename", "fsync"]


@pytest.mark.parametrize("error", [Killed(), KeyboardInterrupt(), OSError(errno.EIO, "broken")], ids=repr)
@pytest.mark.parametrize(
    ("save", "old", "operations"),
    [(replace_file, replace_file, FILE), (replace, None, NEW), (replace, made, FOLDER)],
    ids=["file", "new folder", "folder"],
)
def test_a_save_that_ends_at_any_operation_leaves_the_old_or_the_new(save, old, operations, error, tmp_path):

    def make(place: Path) -> None:
        if old is made:
            made(place / "out", "old")
        elif old is not None:
            write_json(place / "out", {"name": "old"})

    found = []
    ends = [*at_every_operation(tmp_path, make, lambda place: save(place / "out"), error)]
    assert ends[-1][1] == operations
    for place, _ in ends:
        out = place / "out"
        left = {path.name for path in place.iterdir()} - {"out"}
        module.remove_leftovers(out)
        assert [path for path in place.iterdir() if path != out] == []
        found.append(name_of(out) if out.exists() else "none")
        if found[-1] == "new":
            assert save is replace_file or (out / "deep" / "a").read_text() == "a"
        elif isinstance(error, OSError):
            assert not left, "an error cleans up"
    assert set(found) == {"none" if old is None else "old", "new"}
    assert found[-1] == "new"
    assert isinstance(error, OSError) or found == sorted(found, key="new".__eq__)  # an error may be without effect


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


# --- what is replaced ---------------------------------------------------------------------------------------------
def test_force_replaces_what_pastkey_wrote_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    refuse_existing(out, force=True)  # an empty folder
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(ExistingFolderError, match="did not write it"), whole_folder(out, force=True):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="which is a file"), whole_folder(tmp_path / "file" / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_a_folder_that_another_process_made_meanwhile_is_refused(tmp_path):
    with pytest.raises(ExistingFolderError, match="already exists"):  # noqa: SIM117
        with whole_folder(tmp_path / "out"):
            made(tmp_path / "out", "another's")
    assert name_of(tmp_path / "out") == "another's"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_force_replaces_a_link_and_not_what_it_leads_to(tmp_path):
    made(tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    replace(tmp_path / "current")
    assert (name_of(tmp_path / "current"), name_of(tmp_path / "v1")) == ("new", "v1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "v1"]


def test_a_folder_that_cannot_be_opened_is_not_synced(tmp_path):
    module.sync_folder(tmp_path / "none")


def test_a_file_has_the_mode_that_the_umask_leaves(tmp_path):
    before = os.umask(0o022)
    try:
        for mode in (0o666, 0o600):
            module.write_whole(tmp_path / "a", b"a", mode=mode)
            assert (tmp_path / "a").stat().st_mode & 0o777 == mode & 0o755
        replace(tmp_path / "b")
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


def written_again(folder: Path) -> list[Path]:
    replace(folder / "out")
    write_json(folder / "out.json", {"a": 1})
    return sorted(folder.iterdir())


@needs_locks
def test_what_a_process_left_goes_with_the_next_when_it_is_dead(living, tmp_path):
    process, work = living
    others = [tmp_path / name for name in (".out.else.0123abcd.partial", ".out.0123.partial", ".in.0123abcd.old")]
    for other in others:
        other.mkdir()
    assert len(written_again(tmp_path)) == len(others) + 4
    assert work.is_dir()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert written_again(tmp_path) == sorted([*others, tmp_path / "out", tmp_path / "out.json"])


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

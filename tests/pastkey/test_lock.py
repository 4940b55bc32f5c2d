"""A lock is one process's, follows its folder, and ends with its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pastkey import lock
from pastkey.errors import InUseError
from pastkey.lock import held, is_held, locked, require_unlocked

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")

HOLD = """
import sys, time
from pathlib import Path
from pastkey.lock import held, locked
with locked(Path(sys.argv[1]), "busy"), held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def another(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def take(folder: Path) -> None:
    with locked(folder, "it"):
        assert (folder / "lock").is_file()


def test_a_folder_that_another_process_holds_is_refused_until_that_dies(tmp_path: Path) -> None:
    with another(tmp_path) as process:
        for attempt in (take, lambda folder: require_unlocked(folder, "it")):
            with pytest.raises(InUseError, match=rf"^it is being trained by process {process.pid}: wait"):
                attempt(tmp_path)
        assert is_held(tmp_path)
        process.send_signal(signal.SIGKILL)
    assert not is_held(tmp_path)
    require_unlocked(tmp_path, "")
    take(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_lock_follows_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with locked(tmp_path / "a", ""):
        (tmp_path / "a").rename(tmp_path / "b")
        with pytest.raises(InUseError):
            take(tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []


def test_a_lock_file_that_its_owner_removed_meanwhile_locks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken between another's removal of the file and its end: a third process would make a file of its own."""
    original, calls = lock._take, list[int]()

    def late(file: int) -> bool | None:
        if not calls:
            (tmp_path / "lock").unlink()
        calls.append(file)
        return original(file)

    monkeypatch.setattr(lock, "_take", late)
    with locked(tmp_path, ""):
        assert len(calls) == 2
        with pytest.raises(InUseError):
            take(tmp_path)


def test_without_locks_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def unsupported(*_: object) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path, ""), held(tmp_path):
        take(tmp_path)
        assert not is_held(tmp_path)


def test_no_folder_is_held_by_nobody(tmp_path: Path) -> None:
    assert not is_held(tmp_path / "none")
    require_unlocked(tmp_path / "none", "")
    with held(tmp_path / "none"):
        pass


def test_the_file_says_which_process_holds_it(tmp_path: Path) -> None:
    with locked(tmp_path, ""):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"

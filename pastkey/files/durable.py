"""Writes files and folders atomically, whatever ends the process that writes them.

An unfinished one is .NAME.xxxxxxxx.partial next to NAME, with a lock (flock) that the system releases when its process
dies. The next process that writes NAME removes those that no living process holds. Two renames replace a folder: a kill
in between leaves the old one as .NAME.xxxxxxxx.old, and the next process that writes NAME restores it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

from ..errors import ExistingFolderError, InputError, InUseError

MANIFEST: Final = "pastkey.json"  # in every folder that pastkey wrote; written last

if sys.platform != "win32":
    import fcntl

_PARTIAL, _OLD = ".partial", ".old"


# --- writing folders ----------------------------------------------------------------------------------------------
class NewFolder:
    """A folder that is filled next to its target and then moved there. Created by `new_folder`.

    Attributes:
        target: Its final path.
        path: Its current path.
    """

    def __init__(self, target: Path, path: Path, *, force: bool = False) -> None:
        self.target, self.path, self._force = target, path, force

    def put(self) -> None:
        """Moves the folder to its target, and removes the old one there. Raises as `refuse_existing`, and OSError."""
        sync_tree(self.path)
        refuse_existing(self.target, force=self._force)
        old = self.path
        with locked(self.target):
            _put_in_place(self.path, self.target)
        self.path = self.target
        sync_folder(self.target.absolute().parent)
        _remove(old)


@contextlib.contextmanager
def new_folder(target: Path, *, force: bool = False) -> Iterator[NewFolder]:
    """Creates a locked folder, which `NewFolder.put` moves to `target`. Without `put`, the folder is removed.

    Raises ExistingFolderError if the target exists, unless `force` is given and the target is a folder that pastkey
    wrote (or an empty one): nothing else is ever replaced.
    """
    remove_leftovers(target)
    refuse_existing(target, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _beside(target, Path.mkdir) as work:
        yield NewFolder(target, work, force=force)


@contextlib.contextmanager
def whole_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a folder next to `target`; moves it there on success, removes it on any failure. As `new_folder`."""
    with new_folder(target, force=force) as folder:
        yield folder.path
        folder.put()


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raises ExistingFolderError if `new_folder` would, InputError if no folder can be created.

    Raises InUseError if a process trains in the folder that would be replaced. Call it before long work.
    """
    refuse_below_a_file(target)
    if not os.path.lexists(target):
        return
    if not force:
        raise ExistingFolderError(f"{target} already exists: choose another --out, or replace it with --force")
    replaceable = is_empty(target) or (target / MANIFEST).is_file()
    if not replaceable:
        raise ExistingFolderError(
            f"{target} exists and pastkey did not write it (it has no {MANIFEST}), so --force does not replace it: "
            "choose another --out"
        )
    with locked(target):
        pass


def refuse_below_a_file(target: Path) -> None:
    """Raises InputError if a part of the path is a file."""
    file = next((parent for parent in target.absolute().parents if parent.exists() and not parent.is_dir()), None)
    if file is not None:
        raise InputError(f"{target} is under {file}, which is a file: choose another --out")


def is_empty(folder: Path) -> bool:
    """Whether this is an empty folder."""
    return folder.is_dir() and not any(folder.iterdir())


# --- writing files ------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def whole_file(path: Path, *, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """Yields a file to write; moves it to `path` on success, removes it on any failure. The umask applies to `mode`.

    Raises InputError if `path` is a pipe or a device, OSError if writing fails.
    """
    refuse_special(path)
    remove_leftovers(path)
    with _beside(path, lambda work: os.close(os.open(work, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))) as work:
        with work.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        work.replace(path)


def write_whole(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Writes a file atomically. Raises as `whole_file`."""
    with whole_file(path, mode=mode) as file:
        file.write(content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes readable JSON atomically. Raises as `whole_file`."""
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def refuse_special(path: Path) -> None:
    """Raises InputError if `path` is a pipe or a device: a file would replace it, even /dev/null."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path} is a pipe or a device, which a file would replace: choose another name")


# --- shared -------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _beside(target: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """Yields the path that `make` made next to `target`, locked. Removes its rest at the end."""
    while True:
        work = target.with_name(f".{target.name}.{os.urandom(4).hex()}{_PARTIAL}")
        try:
            make(work)
            with locked(work, wait=True):
                if os.path.lexists(work):  # otherwise another process believed it, not yet locked, to be a dead one's
                    yield work
                    return
        finally:
            _remove(work)


def _leftovers(target: Path) -> list[Path]:
    """Returns the unfinished files of processes next to `target`, and those in work."""
    name = re.compile(re.escape(f".{target.name}.") + rf"[0-9a-f]{{8}}({_PARTIAL}|{_OLD})")
    folder = target.absolute().parent
    return [path for path in folder.iterdir() if name.fullmatch(path.name)] if folder.is_dir() else []


def remove_leftovers(target: Path) -> None:
    """Removes files that dead processes left next to `target`. Restores the old folder if one died while replacing it.

    Removes nothing if the system or the file system has no locks.
    """
    for path in _leftovers(target):
        with contextlib.suppress(OSError):  # another process was faster, or this system cannot open folders
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if not _take(descriptor):
                    continue
                if path.suffix == _OLD and not os.path.lexists(target):
                    path.rename(target)
                else:
                    _remove(path)
            finally:
                os.close(descriptor)


def _remove(path: Path) -> None:
    """Removes a file, a link or a folder as far as possible: the next process removes the rest."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        with contextlib.suppress(OSError):
            path.unlink()


def _put_in_place(work: Path, target: Path) -> None:
    """Renames `work` to `target`; the old one is then called `work`. Raises OSError without any change."""
    if not os.path.lexists(target):
        work.rename(target)
    else:
        old = work.with_suffix(_OLD)
        target.rename(old)
        try:
            work.rename(target)
        except BaseException:
            with contextlib.suppress(OSError):  # otherwise `remove_leftovers` does it
                old.rename(target)
            raise
        old.rename(work)


def sync_tree(folder: Path) -> None:
    """Flushes a folder with all its files to the disk, so that a power cut after its renaming loses nothing."""
    for place, _, files in os.walk(folder):
        for name in files:
            _sync(Path(place, name))
        sync_folder(Path(place))


def sync_folder(folder: Path) -> None:
    """Flushes a folder's names to the disk. Some systems cannot open folders; there a power cut may lose a rename."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- locks --------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock of a file or folder, which may be renamed meanwhile. With `wait`, waits for it.

    Raises InUseError if another process holds it. Windows and some network file systems have no such lock: there, and
    for a path that cannot be opened, nothing is locked.
    """
    try:
        descriptor = None if sys.platform == "win32" else os.open(path, os.O_RDONLY)
    except OSError:
        descriptor = None
    if descriptor is None:
        yield
        return
    try:
        lock_file(descriptor, path, wait=wait)
        yield
    finally:
        os.close(descriptor)


def lock_file(descriptor: int, path: Path, *, wait: bool = False) -> None:
    """Locks an open file or folder until it is closed. Raises InUseError if another process holds it."""
    if _take(descriptor, wait=wait) is False:
        raise InUseError(f"{path} is being written by another process: wait for its end, or stop it")


def _take(descriptor: int, *, wait: bool = False) -> bool | None:
    """Returns whether a lock was acquired, now or with `wait` when it is free; None if there are no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return None
    return True

"""Says of a folder that a living process works in it. The system forgets the lock of a process that died."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from .errors import InUseError

if sys.platform != "win32":
    import fcntl

_LOCK = "lock"


@contextlib.contextmanager
def locked(folder: Path, checkpoint: object, busy: str = "being trained") -> Iterator[None]:
    """Holds a lock on `folder`, by a file `lock` in it that goes at the end. The folder may be renamed meanwhile.

    Raises InUseError, which says that `checkpoint` is `busy`, where another process holds it; OSError where no file can
    be made in `folder`. Where the system or the file system has no locks, nothing is held.
    """
    if sys.platform == "win32":  # a file that is open there would keep its folder from being renamed
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        held = _lock_file(place, checkpoint, busy)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(_LOCK, dir_fd=place)
            os.close(held)
    finally:
        os.close(place)


def require_unlocked(folder: Path, checkpoint: object) -> None:
    """Raises InUseError where another process holds the lock of `folder`, as `locked` does."""
    try:
        file = os.open(folder / _LOCK, os.O_RDONLY)
    except OSError:
        return
    try:
        if _take(file) is False:
            raise _in_use(file, checkpoint)
    finally:
        os.close(file)


def lock_file(descriptor: int, path: object) -> None:
    """Locks an open file until it is closed. Raises InUseError where another process holds it."""
    if _take(descriptor) is False:
        raise InUseError(f"{path} is being written by another process: wait for its end, or stop it")


def _in_use(file: int, checkpoint: object, busy: str = "being trained") -> InUseError:
    owner = os.read(file, 20).decode("ascii", "replace").strip() or "?"
    return InUseError(f"{checkpoint} is {busy} by process {owner}: wait for its end, or stop it")


def _lock_file(place: int, checkpoint: object, busy: str) -> int:
    """The descriptor of the lock file in an open folder, locked where that can be."""
    while True:
        file = os.open(_LOCK, os.O_RDWR | os.O_CREAT, 0o666, dir_fd=place)
        try:
            taken = _take(file)
            if taken is False:
                raise _in_use(file, checkpoint, busy)
            # Whoever held it before may have removed the file between the two calls: then it locks out nobody.
            if taken is None or _is_named(file, place):
                os.ftruncate(file, 0)
                os.write(file, f"{os.getpid()}\n".encode())
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _is_named(file: int, place: int) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(_LOCK, dir_fd=place))
    except FileNotFoundError:
        return False


def _take(descriptor: int, *, wait: bool = False) -> bool | None:
    """Whether a lock was taken, now or with `wait` when it is free; None where there are none."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return None
    return True


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Marks a folder as one that a living process fills, which `is_held` tells. It leaves no file in it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # systems that open no folders
        yield
        return
    try:
        _take(descriptor, wait=True)  # for a moment, `is_held` of another process has it
        yield
    finally:
        os.close(descriptor)


def is_held(folder: Path) -> bool:
    """Whether a living process fills this folder, as far as the system can tell."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _take(descriptor) is False
    finally:
        os.close(descriptor)

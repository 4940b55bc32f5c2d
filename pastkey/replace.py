"""Puts a new folder in the place of another, so that at every moment a whole one stands at the name.

Linux and macOS exchange two names in one step, where the file system can. Elsewhere it takes two renames, between which
nothing stands at the name; should the second fail, and putting the old one back, too, an error says where it lies.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import tempfile
from pathlib import Path

from .errors import ResourceError
from .lock import is_held

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # of Linux' renameat2, and RENAME_SWAP of macOS' renamex_np
# What a system says that knows no exchange, a file system that has none, and a sandbox that lets none through.
_UNKNOWN = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


def exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step. Returns False where that cannot be done here. Raises OSError as renames do."""
    if sys.platform == "win32":
        return False
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            failed = libc.renamex_np(*names, _RENAME_EXCHANGE)
        else:
            failed = libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    except AttributeError:  # a C library without it
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def put_in_place(work: Path, target: Path) -> Path:
    """Renames `work` to `target`. Returns where that lies which stood there, for the caller to remove.

    Raises OSError, and then `target` is as it was; ResourceError where it could not be put back, either.
    """
    if not os.path.lexists(target):
        work.rename(target)
        return work
    if exchange(work, target):
        return work
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    aside = old / target.name
    try:
        target.rename(aside)
        work.rename(target)
    except BaseException as error:
        if os.path.lexists(aside) and not os.path.lexists(target):
            _put_back(aside, target, error)
        with contextlib.suppress(OSError):  # it holds something: what `target` was
            old.rmdir()
        raise
    return old


def _put_back(aside: Path, target: Path, cause: BaseException) -> None:
    try:
        aside.rename(target)
    except OSError:
        raise ResourceError(
            f"{target} could not be replaced ({cause}), nor put back: it lies whole in {aside}; rename it to {target}"
        ) from cause
    except BaseException:  # interrupted once more, before the renaming
        if os.path.lexists(aside) and not os.path.lexists(target):
            aside.rename(target)
        raise


def sync_tree(folder: Path) -> None:
    """Puts a folder with all its files on the disk itself, so that a power cut after its renaming loses nothing."""
    for place, _, files in os.walk(folder):
        for name in files:
            _sync(Path(place, name))
        sync_folder(Path(place))


def sync_folder(folder: Path) -> None:
    """Puts a folder's names on the disk itself. Not every system opens folders; a power cut may cost a rename there."""
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


def leftovers(target: Path) -> list[str]:
    """A sentence for each hidden folder that a killed process left beside `target` when it wrote there."""
    hidden = re.compile(re.escape(f".{target.name}.") + r"[a-z0-9_]{8}\.(partial|old)")
    try:
        beside = sorted(target.absolute().parent.iterdir())
    except OSError:
        return []
    found = []
    for path in beside:
        if not hidden.fullmatch(path.name) or path.is_symlink() or not path.is_dir() or is_held(path):
            continue
        shown = target.parent / path.name
        if path.suffix == ".old" and (path / target.name).is_dir() and not os.path.lexists(target):
            found.append(
                f"{shown / target.name} is what stood at {target} when a run was killed that was to replace it: "
                f"rename it to {target} to have it back"
            )
        else:
            found.append(f"{shown} was left by a run that was killed; nothing needs it: remove it")
    return found

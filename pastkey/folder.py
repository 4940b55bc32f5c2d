"""Files and folders that are whole or not there: written beside their name and renamed, read only after a check.

A checkpoint and a bundle both carry a manifest, pastkey.json, with size and sha256 of each of their files.

What is written stands as .NAME.xxxxxxxx.partial beside NAME, with a lock (flock) that the system forgets when its
process dies. The next process that writes NAME removes what no living process holds. Linux and macOS exchange two names
in one step, where the file system can. Elsewhere a folder is replaced by two renames: a kill in between leaves the old
one as .NAME.xxxxxxxx.old, and the next process that writes NAME puts it back.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from .errors import ExistingFolderError, InputError, IntegrityError, InUseError, MissingFileError
from .memory import require_memory_for
from .names import MANIFEST
from .reading import MOST_JSON, note_reading, parse_json, read_bytes, require_regular
from .values import is_int, shown

if sys.platform != "win32":
    import fcntl

_SHA256 = re.compile("[0-9a-f]{64}")
_LARGE_TEXT = 10_000_000  # bytes
_LONGEST_NAME = 1024  # characters of a path in a folder
_HUB_PREFIXES = ("models--", "datasets--", "spaces--")  # of a repository's folder in Hugging Face's cache

_PARTIAL, _OLD = ".partial", ".old"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # of Linux' renameat2, and RENAME_SWAP of macOS' renamex_np
# What a system says that knows no exchange, a file system that has none, and a sandbox that lets none through.
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of one file."""

    size: int  # bytes
    sha256: str  # hexadecimal


# --- writing folders ----------------------------------------------------------------------------------------------
class NewFolder:
    """A folder that is filled beside its name, and then put there. Made by `new_folder`.

    Attributes:
        target: Its name.
        path: Where it is.
    """

    def __init__(self, target: Path, path: Path, *, force: bool = False) -> None:
        self.target, self.path, self._force = target, path, force

    def put(self) -> None:
        """Puts the folder at its name, and removes what stood there. Raises as `refuse_existing`, and OSError."""
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
    """Makes a folder for `target`, which `NewFolder.put` puts at its name: else it is removed. It is locked meanwhile.

    Raises ExistingFolderError when the target exists, unless `force` is given and the target is a folder that
    pastkey wrote (or an empty one): nothing else is ever replaced.
    """
    remove_leftovers(target)
    refuse_existing(target, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _beside(target, Path.mkdir) as work:
        yield NewFolder(target, work, force=force)


@contextlib.contextmanager
def whole_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a folder beside `target`; puts it there on success, removes it on any failure. Raises as `new_folder`."""
    with new_folder(target, force=force) as folder:
        yield folder.path
        folder.put()


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raises ExistingFolderError where `new_folder` would, InputError where no folder can be made.

    InUseError where a process trains in the folder that would be replaced. Call it before long work.
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
    """Raises InputError where nothing can be made, since a part of the path is a file."""
    file = next((parent for parent in target.absolute().parents if parent.exists() and not parent.is_dir()), None)
    if file is not None:
        raise InputError(f"{target} lies under {file}, which is a file: choose another --out")


def is_empty(folder: Path) -> bool:
    """Whether this is a folder with nothing in it."""
    return folder.is_dir() and not any(folder.iterdir())


# --- writing files ------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def whole_file(path: Path, *, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """Yields a file to write; puts it at `path` on success, removes it on any failure. The umask takes from `mode`.

    Raises InputError where a pipe or a device is there, OSError where nothing can be written.
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
    """Writes a file, whole or not at all. Raises as `whole_file`."""
    with whole_file(path, mode=mode) as file:
        file.write(content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes readable JSON, whole or not at all. Raises as `whole_file`."""
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def refuse_special(path: Path) -> None:
    """Raises InputError where a pipe or a device is there: a file would be put in its place, /dev/null's too."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path} is a pipe or a device, which a file would replace: choose another name")


def file_record(path: Path) -> FileRecord:
    """Size and hash of one file."""
    return FileRecord(size=path.stat().st_size, sha256=sha256(path))


def file_records(folder: Path, files: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The manifest's `files`: for each path relative to the folder (with forward slashes), its size and hash."""
    return {name: asdict(file_record(folder / name)) for name in sorted(files)}


# --- what both are made of ----------------------------------------------------------------------------------------
@contextlib.contextmanager
def _beside(target: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """Yields what `make` made beside `target`, locked. What is there of it at the end is removed."""
    while True:
        work = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_PARTIAL}")
        try:
            make(work)
            with locked(work, wait=True):
                if os.path.lexists(work):  # else another process took it, not yet locked, for a dead one's
                    yield work
                    return
        finally:
            _remove(work)


def remove_leftovers(target: Path) -> None:
    """Removes what dead processes left beside `target`; puts back what stood there where one died at its replacement.

    Where the system or the file system has no locks, nothing is removed.
    """
    name = re.compile(re.escape(f".{target.name}.") + rf"[0-9a-f]{{8}}({_PARTIAL}|{_OLD})")
    folder = target.absolute().parent
    for path in [path for path in folder.iterdir() if name.fullmatch(path.name)] if folder.is_dir() else []:
        with contextlib.suppress(OSError):  # another process is quicker, or this system opens no folders
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
    """Removes a file, a link or a folder, as far as the disk lets it: the next process removes the rest."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        with contextlib.suppress(OSError):
            path.unlink()


def _put_in_place(work: Path, target: Path) -> None:
    """Renames `work` to `target`; what stood there is called `work` then. Raises OSError, and nothing has changed."""
    if not os.path.lexists(target):
        work.rename(target)
    elif not exchange(work, target):
        old = work.with_suffix(_OLD)
        target.rename(old)
        try:
            work.rename(target)
        except BaseException:
            with contextlib.suppress(OSError):  # then `remove_leftovers` does it
                old.rename(target)
            raise
        old.rename(work)


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
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


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


# --- locks --------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock of a file or folder, which may be renamed meanwhile, or with `wait` waits for it.

    Raises InUseError where another process holds it. Windows has no such lock, and neither have some network file
    systems: nothing is held there, nor of what cannot be opened.
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
    """Locks an open file or folder until it is closed. Raises InUseError where another process holds it."""
    if _take(descriptor, wait=wait) is False:
        raise InUseError(f"{path} is being written by another process: wait for its end, or stop it")


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


# --- reading ------------------------------------------------------------------------------------------------------
def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises MissingFileError or IntegrityError, each naming the file."""
    try:
        content = parse_json(read_bytes(path, MOST_JSON), path)
    except MissingFileError:
        raise MissingFileError(f"{path} is missing") from None
    if not isinstance(content, dict):
        raise IntegrityError(f"{path} holds a JSON {type(content).__name__}; an object was expected")
    return content


def read_text(path: Path) -> str:
    """A text file's content, line ends as they are.

    Raises MissingFileError, or InputError for what is no regular file, or no text.
    """
    size = require_regular(path).st_size
    if size > _LARGE_TEXT:
        require_memory_for(path, 6 * size)  # its bytes, and up to four for each character
    return decode_text(path.read_bytes(), path)


def decode_text(content: bytes, source: object) -> str:
    """The text that these bytes of `source` are. Raises InputError naming the first byte that is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x} ({error.reason}); "
            "convert it to UTF-8"
        ) from None


def require_manifest(folder: Path, kind: str) -> None:
    """Raises MissingFileError or InputError where this is no folder with a manifest; `kind` is what it should be."""
    if not folder.exists():
        raise MissingFileError(f"no such {kind}: {folder} does not exist")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; a {kind} is a folder")
    if not (folder / MANIFEST).is_file():
        raise MissingFileError(f"{folder} is not a {kind}: it has no {MANIFEST}")


def read_manifest(folder: Path, kind: str, newest_version: int) -> dict[str, Any]:
    """Reads pastkey.json of a "checkpoint" or "bundle" and checks its kind and version."""
    require_manifest(folder, kind)
    manifest = read_json(folder / MANIFEST)
    found = manifest.get("kind")
    if found != kind:
        hint = {"checkpoint": "export it first", "bundle": "name the checkpoint it came from"}.get(str(found), "")
        raise InputError(f"{folder} is a {shown(found)} folder; a {kind} was expected" + (f": {hint}" if hint else ""))
    version = manifest.get("format_version")
    if not is_int(version, 1, 2**31 - 1):
        raise IntegrityError(f"{folder / MANIFEST} has no valid format_version (found {shown(version)})")
    if version > newest_version:
        raise IntegrityError(
            f"{folder} has {kind} format version {version}; this pastkey reads up to {newest_version}: upgrade pastkey"
        )
    return manifest


def parse_records(folder: Path, content: Any) -> dict[str, FileRecord]:
    """The manifest's `files`, each path checked to stay inside the folder."""
    if not isinstance(content, dict):
        raise IntegrityError(f"{folder / MANIFEST} has no list of files")
    records = {}
    for name, entry in content.items():
        if not is_inside(name):
            raise IntegrityError(f"{folder / MANIFEST} names {shown(name)}, which is not a path inside the folder")
        size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if not is_int(size, 0, 2**63 - 1) or not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise IntegrityError(f"{folder / MANIFEST} has no size and sha256 for {shown(name)}")
        records[name] = FileRecord(size, digest)
    return records


def is_inside(name: str) -> bool:
    """Whether this is a plain relative path, which leads to below the folder that it is said of, on every system.

    No file's name has a *: with one, onnxruntime takes an address in memory for a path.
    """
    path = PurePosixPath(name)
    within = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return within and len(name) <= _LONGEST_NAME and not set(name) & set("\\:*\0")


def check_sizes(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Raises IntegrityError naming the first file that is missing, of another size, or outside the folder."""
    for name, record in records.items():
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{path} is missing: copy the whole folder again")
        if leads_out(path, folder):
            raise IntegrityError(f"{path} leads out of the folder: copy the file itself into it")
        size = path.stat().st_size
        if size != record.size:
            raise IntegrityError(
                f"{path} has {size} bytes, {record.size} were expected: it was truncated or altered, copy it again"
            )


def check_hashes(folder: Path, records: Mapping[str, FileRecord], *, remembered: bool = True) -> None:
    """Raises IntegrityError naming the first file whose content is not what was written.

    A hash that matched is remembered by size, modification time and inode in the user's cache folder, since
    hashing 154 MB takes half of a model's load; `remembered=False` hashes again whatever is remembered.
    """
    memory = _HashMemory(folder)
    for name, record in records.items():
        path = folder / name
        if remembered and memory.knows(path, record):
            continue
        found = sha256(path)
        if found != record.sha256:
            raise IntegrityError(
                f"{path} was altered: its sha256 is {found[:12]}…, {record.sha256[:12]}… was expected; copy it again"
            )
        memory.add(path, record)
    memory.save()


def sha256(path: Path) -> str:
    """The hash of a file's content, in hexadecimal digits."""
    note_reading(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a file of `folder` is, or lies behind, a link to outside of it.

    Not where it is one that Hugging Face's cache makes to its own store, each time in just this way:
    models--X/snapshots/REV/FILE is a link to ../../blobs/HASH, with one more .. for each folder that FILE lies in.
    """
    root, parent, target = folder.resolve(), path.parent.resolve(), path.resolve()
    if parent != root and root not in parent.parents:
        return True
    return root not in target.parents and not any(
        place.name == "snapshots"
        and place.parent.name.startswith(_HUB_PREFIXES)
        and path.readlink() == Path(*[".."] * (up + 2), "blobs", target.name)
        and target == place.parent / "blobs" / target.name
        for up, place in enumerate(parent.parents)
    )


def hub_store(folder: Path) -> Path | None:
    """Where the links of a folder in Hugging Face's cache lead to; None for any other folder."""
    for place in folder.resolve().parents:
        if place.name == "snapshots" and place.parent.name.startswith(_HUB_PREFIXES):
            return place.parent / "blobs"
    return None


def user_cache_file(name: str) -> Path | None:
    """Where a file of the user's cache folder is, or would be; None where there can be none."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    except (RuntimeError, OSError):  # no home, as in some containers
        return None
    return cache / "pastkey" / name if cache.is_absolute() else None


class _HashMemory:
    """Which files of one folder were seen with which hash, in a small file of the user's cache folder.

    A cache that cannot be read or written costs time, and nothing else.
    """

    def __init__(self, folder: Path) -> None:
        self._path: Path | None = None
        self._seen: dict[str, Any] = {}
        self._changed = False
        with contextlib.suppress(OSError, ValueError, RecursionError):
            key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]
            self._path = user_cache_file(f"{key}.json")
            content = {} if self._path is None else json.loads(self._path.read_text(encoding="utf-8"))
            self._seen = content if isinstance(content, dict) else {}

    @staticmethod
    def _state(path: Path, record: FileRecord) -> list[Any]:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, record.sha256]

    def knows(self, path: Path, record: FileRecord) -> bool:
        return self._seen.get(str(path)) == self._state(path, record)

    def add(self, path: Path, record: FileRecord) -> None:
        self._seen[str(path)] = self._state(path, record)
        self._changed = True

    def save(self) -> None:
        if self._path is None or not self._changed:
            return
        with contextlib.suppress(OSError, ValueError):  # ValueError: a path that is no text
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, self._seen)

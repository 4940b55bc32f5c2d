"""Folders that are whole or not there: written beside their target and renamed, read only after a check.

A checkpoint and a bundle both carry a manifest, pastkey.json, with size and sha256 of each of their files.
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
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import ExistingFolderError, InputError, IntegrityError, MissingFileError
from .lock import held, require_unlocked
from .memory import require_memory_for
from .names import MANIFEST
from .reading import MOST_JSON, note_reading, parse_json, read_bytes, require_regular
from .replace import put_in_place, sync_folder, sync_tree
from .values import is_int, shown

_SHA256 = re.compile("[0-9a-f]{64}")
_LARGE_TEXT = 10_000_000  # bytes
_STALE = 3600  # seconds, of which no file takes so many to write
_LONGEST_NAME = 1024  # characters of a path in a folder
_HUB_PREFIXES = ("models--", "datasets--", "spaces--")  # of a repository's folder in Hugging Face's cache


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of one file."""

    size: int  # bytes
    sha256: str  # hexadecimal


# --- writing ------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def whole_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `target`; renames it to `target` on success, removes it on any failure.

    Raises ExistingFolderError when the target exists, unless `force` is given and the target is a folder that
    pastkey wrote (or an empty one): nothing else is ever replaced.
    """
    refuse_existing(target, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = rest = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        with held(work):
            yield work
            work.chmod(0o777 & ~_umask())
            sync_tree(work)
            rest = _put(work, target, force=force)
        sync_folder(target.parent)
    finally:
        remove_folder(rest)


def _put(work: Path, target: Path, *, force: bool) -> Path:
    """Puts `work` at its name. Returns where that lies which stood there."""
    for _ in range(2):  # another process may make or remove the target at any moment
        refuse_existing(target, force=force)
        try:
            return put_in_place(work, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise
    refuse_existing(target, force=force)
    return put_in_place(work, target)


def remove_folder(folder: Path) -> None:
    """Removes a folder as far as the disk lets it, also where an impatient user interrupts that once more.

    Of a link, the link alone.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        if folder.exists():  # interrupted, or the disk failed once
            shutil.rmtree(folder, ignore_errors=True)


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raises ExistingFolderError where `whole_folder` would, InputError where no folder can be made.

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
    require_unlocked(target / "training", target)


def refuse_below_a_file(target: Path) -> None:
    """Raises InputError where nothing can be made, since a part of the path is a file."""
    file = next((parent for parent in target.absolute().parents if parent.exists() and not parent.is_dir()), None)
    if file is not None:
        raise InputError(f"{target} lies under {file}, which is a file: choose another --out")


def is_empty(folder: Path) -> bool:
    """Whether this is a folder with nothing in it."""
    return folder.is_dir() and not any(folder.iterdir())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes readable JSON, whole or not at all, and leaves nothing else beside it."""
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def refuse_special(path: Path) -> None:
    """Raises InputError where a pipe or a device is there: a file would be put in its place, /dev/null's too."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path} is a pipe or a device, which a file would replace: choose another name")


def write_whole(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Writes a file, whole or not at all, and leaves nothing else beside it. The umask takes from `mode` as ever.

    Raises InputError where a pipe or a device is there, OSError where nothing can be written.
    """
    refuse_special(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")  # two may write at once
    try:
        with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _remove_stale(path)


def _remove_stale(path: Path) -> None:
    """Removes what killed processes left beside `path` when they wrote it. Another one may be writing it now."""
    left, latest = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{8}\.new"), time.time() - _STALE
    with contextlib.suppress(OSError), os.scandir(path.parent) as beside:
        for entry in beside:
            if left.fullmatch(entry.name) and entry.stat(follow_symlinks=False).st_mtime < latest:
                Path(entry).unlink()


def file_record(path: Path) -> FileRecord:
    """Size and hash of one file."""
    return FileRecord(size=path.stat().st_size, sha256=sha256(path))


def file_records(folder: Path, files: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The manifest's `files`: for each path relative to the folder (with forward slashes), its size and hash."""
    return {name: asdict(file_record(folder / name)) for name in sorted(files)}


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""A folder with a manifest, such as a checkpoint or a bundle. Its files are checked before they are read.

The manifest is pastkey.json, with the size and sha256 of each file in the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import InputError, IntegrityError, MissingFileError
from ..values import is_int, shown
from .durable import MANIFEST, write_json
from .memory import require_memory_for
from .reading import MOST_JSON, note_reading, parse_json, read_bytes, require_regular

_SHA256 = re.compile("[0-9a-f]{64}")
_LARGE_TEXT = 10_000_000  # bytes
_LONGEST_NAME = 1024  # characters of a path in a folder
_CONFIG = "config.json"
_HUB_NAME = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"  # of an owner, and of a model, on Hugging Face
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.)){_HUB_NAME}/{_HUB_NAME}", re.ASCII)
_OTHER_HUB_FORM = re.compile(
    rf"(?:https?:/+)?(?:huggingface|hf)\.co/({_HUB_NAME}/{_HUB_NAME})|({_HUB_NAME}/{_HUB_NAME})@"
)
# Of sources and bundles, not of ids.
_FILES = (".gguf", ".bin", ".onnx", ".safetensors", ".py", ".ipynb", ".zip", ".json")
_HUB_PREFIXES = ("models--", "datasets--", "spaces--")  # of a repository's folder in Hugging Face's cache


@dataclass(frozen=True)
class FileRecord:
    """The manifest's entry for one file."""

    size: int  # bytes
    sha256: str  # hexadecimal


def file_record(path: Path) -> FileRecord:
    """Returns the size and hash of one file."""
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
    """Returns a text file's content, with its own line ends.

    Raises MissingFileError, or InputError if it is not a regular file or not text.
    """
    size = require_regular(path).st_size
    if size > _LARGE_TEXT:
        require_memory_for(path, 6 * size)  # its bytes, and up to four for each character
    return decode_text(path.read_bytes(), path)


def decode_text(content: bytes, source: object, offset: int = 0) -> str:
    """Decodes the bytes of `source` from `offset` on. Raises InputError naming the first byte that is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"byte {offset + error.start} is 0x{error.object[error.start]:02x} ({error.reason})"
        raise InputError(f"{source} is not UTF-8 text: {wrong}; convert it to UTF-8") from None


def require_manifest(folder: Path, kind: str) -> None:
    """Raises MissingFileError or InputError if this is not a folder with a manifest; `kind` is the expected one."""
    if not folder.exists():
        raise MissingFileError(f"no such {kind}: {folder} does not exist{_to_export(folder, kind)}")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; a {kind} is a folder{_to_export(folder, kind)}")
    if not (folder / MANIFEST).is_file():
        if kind == "bundle" and _has_own_graphs(folder):
            raise MissingFileError(f"{folder} is a bundle without its {MANIFEST}: copy the whole folder again")
        raise MissingFileError(f"{folder} is not a {kind}: it has no {MANIFEST}{_to_export(folder, kind)}")


def hub_id(source: str) -> str | None:
    """Returns `source` if it is the id of a model on the Hugging Face Hub: ORG/NAME, without such a path or folder ORG.

    None for any other text.
    """
    path = Path(source)
    is_id = _HUB_ID.fullmatch(source) and not source.endswith(_FILES)
    return source if is_id and not path.exists() and not path.parent.exists() else None


def hub_hint(source: str) -> str:
    """Returns the end of an error about the address of a model on the Hub, or an id with a revision; "" for others."""
    found = _OTHER_HUB_FORM.match(source)
    known = found and (found[1] or found[2])
    return f"; for a model on the Hugging Face Hub write {known}, which fetches its newest commit" if known else ""


def needs_huggingface(source: str) -> bool:
    """Whether this is a Hub id, a Hugging Face folder or a GGUF file, which pastkey's extra huggingface exports."""
    folder = Path(source)
    if hub_id(source) is not None or folder.suffix == ".gguf":
        return True
    with contextlib.suppress(OSError, ValueError):  # not a valid path
        return (folder / _CONFIG).is_file() and not (folder / MANIFEST).is_file() and not _has_own_graphs(folder)
    return False


def _has_own_graphs(folder: Path) -> bool:
    """Whether a folder has the graphs that only bundles have: a bundle, also where its manifest was lost."""
    return any(folder.glob("onnx/pastkey*"))


def _to_export(path: Path, kind: str) -> str:
    """Returns the end of an error about a path that is not a bundle: the command that exports a bundle from it."""
    if kind != "bundle":
        return ""
    source = str(path.parent if path.suffix == ".safetensors" and path.exists() else path)
    if not needs_huggingface(source) or not (hub_id(source) or path.exists()):
        return hub_hint(source)
    given = "for a model on Hugging Face, type" if hub_id(source) is not None else "export it first: type"
    command = f"pastkey export {shlex.quote(source)} --out bundle"
    return f"; {given}  {command}  (it needs pastkey's extras export,huggingface)"


def read_manifest(folder: Path, kind: str, known: int) -> dict[str, Any]:
    """Reads pastkey.json of a "checkpoint" or "bundle". Checks its kind and its format version."""
    require_manifest(folder, kind)
    manifest = read_json(folder / MANIFEST)
    found = manifest.get("kind")
    if found is None:
        raise InputError(
            f"{folder / MANIFEST} has no kind; the manifest of a {kind} was expected: copy the {kind} again"
        )
    if found != kind:
        hint = {"checkpoint": "export it first", "bundle": "name the checkpoint it came from"}.get(str(found), "")
        raise InputError(f"{folder} is a {shown(found)} folder; a {kind} was expected" + (f": {hint}" if hint else ""))
    version = manifest.get("format_version")
    if not is_int(version, 1, 2**31 - 1):
        raise IntegrityError(f"{folder / MANIFEST} has no valid format_version (found {shown(version)})")
    if version != known:
        remedy = "upgrade pastkey" if version > known else f"make the {kind} again"
        raise IntegrityError(f"{folder} has {kind} format version {version}; this pastkey reads {known}: {remedy}")
    return manifest


def parse_records(folder: Path, content: Any) -> dict[str, FileRecord]:
    """Parses the manifest's `files`, and checks that each path stays inside the folder."""
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
    """Whether this is a plain relative path that stays below its folder, on every system.

    A * is an error: onnxruntime reads a path with one as a memory address.
    """
    path = PurePosixPath(name)
    within = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return within and len(name) <= _LONGEST_NAME and not set(name) & set("\\:*\0")


def check_sizes(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Raises IntegrityError naming the first file that is missing, of a different size, or outside the folder."""
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
    """Raises IntegrityError naming the first file whose content was altered.

    A matching hash is remembered by size, modification time and inode in the user's cache folder, since hashing 154 MB
    is half of a model's load. `remembered=False` hashes all files again.
    """
    memory = Remembered(f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]}.json")
    known = dict(memory.content)
    for name, record in records.items():
        path = folder / name
        if remembered and known.get(str(path)) == _state(path, record):
            continue
        found = sha256(path)
        if found != record.sha256:
            raise IntegrityError(
                f"{path} was altered: its sha256 is {found[:12]}…, {record.sha256[:12]}… was expected; copy it again"
            )
        memory.content[str(path)] = _state(path, record)
    if memory.content != known:
        memory.save()


def _state(path: Path, record: FileRecord) -> list[Any]:
    """The facts by which a changed file of this record is known since it was hashed."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, record.sha256]


def sha256(path: Path) -> str:
    """Returns the hash of a file's content, in hexadecimal digits."""
    note_reading(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a file of `folder` is, or is behind, a link that leads out of it.

    Links of Hugging Face's cache to its own store are allowed, in exactly this form:
    models--X/snapshots/REV/FILE links to ../../blobs/HASH, with one more .. for each folder that FILE is in. That may
    link to ../../blobs/AB/ABHASH, which all repositories share.
    """
    root, parent, target = folder.resolve(), path.parent.resolve(), path.resolve()
    if parent != root and root not in parent.parents:
        return True
    return root not in target.parents and not any(
        place.name == "snapshots"
        and place.parent.name.startswith(_HUB_PREFIXES)
        and path.readlink() == Path(*[".."] * (up + 2), "blobs", path.readlink().name)
        and _is_in_hub_store(place.parent / "blobs" / path.readlink().name, target)
        for up, place in enumerate(parent.parents)
    )


def _is_in_hub_store(blob: Path, target: Path) -> bool:
    """Whether `target` is this blob, or its link's target in the store that all repositories of the cache share."""
    if not blob.is_symlink():
        return target == blob
    shared = Path("blobs", target.name[:2], target.name)
    inside = re.fullmatch(_SHA256, target.name) and blob.readlink() == Path("..", "..") / shared
    return bool(inside) and target == blob.parent.parent.parent / shared


def hub_files(folder: Path) -> list[Path]:
    """Returns the files in Hugging Face's own store that the links of a folder in its cache lead to."""
    links = (file for file in folder.rglob("*") if file.is_symlink() and not leads_out(file, folder))
    return [target for target in (link.resolve() for link in links) if folder.resolve() not in target.parents]


def user_cache_file(name: str) -> Path | None:
    """Returns the path of a file in the user's cache folder, existing or not; None if there can be no such folder."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    except (RuntimeError, OSError):  # no home, as in some containers
        return None
    return cache / "pastkey" / name if cache.is_absolute() else None


class Remembered:
    """A JSON object in the user's cache folder. If it cannot be read or written, only time is lost."""

    def __init__(self, name: str) -> None:
        self._path = user_cache_file(name)
        self.content: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError):
            content = {} if self._path is None else json.loads(self._path.read_text(encoding="utf-8"))
            self.content = content if isinstance(content, dict) else {}

    def save(self) -> None:
        """Writes the content."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: a path that is not text
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._path, self.content)

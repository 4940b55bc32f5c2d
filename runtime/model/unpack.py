"""A bundle that is no folder: a zip file, unpacked no further than its size allows, or a resource of a package.

Standard library only: the process of an untrusted bundle unpacks before it imports any other.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO, Any

from pastkey.contract.names import MANIFEST
from pastkey.errors import InputError, IntegrityError, MissingFileError, PastkeyError, first_line
from pastkey.files.folder import is_inside
from pastkey.files.reading import reading
from pastkey.values import as_path, shown

_MOST_TIMES, _ALWAYS = 20, 10_000_000  # how much larger than its zip file a bundle may be, and bytes that it may be


@dataclass(frozen=True)
class Given:
    """What `load` was given: a path, or the content of a zip file."""

    path: Path
    name: str  # what messages call it
    content: bytes | memoryview | None = None
    copied: Path | None = None  # a temporary folder, which is the path


def given_as(path: Any) -> Given:
    """What this is: a path, bytes, or a resource of a package, whose folder is copied. Nothing of it is read otherwise.

    Raises InputError, MissingFileError.
    """
    if isinstance(path, bytes | bytearray | memoryview):
        return Given(Path("the bytes"), "the bytes", memoryview(path).cast("B"))
    if isinstance(path, Traversable) and not isinstance(path, os.PathLike):
        if path.is_file():
            return Given(Path(path.name), path.name, path.read_bytes())
        if not path.is_dir():
            raise MissingFileError(f"no such bundle: {path.name} is not in its package")
        folder = Path(tempfile.mkdtemp(prefix="pastkey-"))
        _copy(path, folder)
        return Given(folder, path.name, copied=folder)
    found = as_path(path, expected="the path of a bundle folder, or of a zip file of one")
    return Given(found, str(found))


def _copy(source: Traversable, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for part in source.iterdir():
        if part.is_dir():
            _copy(part, target / part.name)
        else:
            with part.open("rb") as read, (target / part.name).open("wb") as written:
                shutil.copyfileobj(read, written)


def unpacked(file: IO[bytes], name: str) -> Path:
    """A temporary folder with what stands beside the manifest in a zip file. See `unpack`."""
    folder = Path(tempfile.mkdtemp(prefix="pastkey-"))
    try:
        unpack(file, name, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def remove(folder: Path, made_by: int) -> None:
    """Removes a temporary folder in the process of this number, which made it: its forks read on there."""
    if os.getpid() == made_by:
        shutil.rmtree(folder, ignore_errors=True)


def tell_as_given(error: BaseException, folder: Path, name: str) -> None:
    """Has the sentence about a bundle in a temporary folder name what the user gave."""
    if isinstance(error, PastkeyError):
        error.args = (str(error).replace(str(folder), name), *error.args[1:])


def unpack(file: IO[bytes], name: str, folder: Path) -> None:
    """Writes what stands beside the manifest in a zip file to an empty folder.

    Raises:
        InputError: It is no zip file.
        MissingFileError: There is no bundle in it.
        IntegrityError: It was cut or altered, or made to fill a disk.
    """
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        raise InputError(f"{name:.60} are no zip file of a bundle folder") from None
    with archive, reading(name, "a zip file of a bundle"):
        stored, size = _sizes(archive)
        if size > _MOST_TIMES * stored + _ALWAYS:
            raise IntegrityError(
                f"{name} would be unpacked to {size:,} bytes, more than {_MOST_TIMES} times its {stored:,}: no "
                "bundle is, and it is left alone"
            )
        manifests = sorted((entry for entry in archive.namelist() if Path(entry).name == MANIFEST), key=len)
        if not manifests:
            raise MissingFileError(f"{name} holds no bundle: it has no {MANIFEST}")
        root = manifests[0].removesuffix(MANIFEST)
        try:
            for entry in archive.infolist():
                inner = entry.filename.removeprefix(root)
                if entry.is_dir() or not entry.filename.startswith(root):
                    continue
                if not is_inside(inner):
                    raise IntegrityError(f"{name} names {shown(inner)}, which is not a path inside the folder")
                (folder / inner).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as read, (folder / inner).open("wb") as written:
                    shutil.copyfileobj(read, written)
        except (zipfile.BadZipFile, EOFError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise IntegrityError(
                f"{name} cannot be unpacked ({first_line(error, 100)}): it was cut or altered"
            ) from None


def _sizes(archive: zipfile.ZipFile) -> tuple[int, int]:
    """Bytes of all files, as they are stored, and as they say that they are unpacked to, which is where each is cut."""
    entries = archive.infolist()
    return sum(entry.compress_size for entry in entries), sum(entry.file_size for entry in entries)

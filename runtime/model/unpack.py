"""Bundles in zip files. The unpacked size is limited.

Standard library only: the sandbox's child process unpacks a bundle before it imports other packages.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pastkey.contract.names import MANIFEST
from pastkey.errors import InputError, IntegrityError, MissingFileError, PastkeyError, first_line
from pastkey.files.reading import reading
from pastkey.values import as_path, shown

_MOST_TIMES, _ALWAYS = 20, 10_000_000  # an unpacked bundle has at most 20 times the bytes of its zip file plus 10 MB
_METHODS = (0, 8)  # stored and deflated; the others make any number of bytes of a piece, in memory
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES)  # not the file's fault
_BLOCK = 4096  # bytes of an empty file or folder on a disk


class TemporaryFolder:
    """A temporary folder, which is removed with this object or by `remove`.

    Only the process that made it removes it: a fork may still read there.

    Attributes:
        path: Its path.
        remove: Removes it, once.
    """

    def __init__(self) -> None:
        import tempfile  # 3 ms with zipfile, which a load of a folder does not spend

        self.path = Path(tempfile.mkdtemp(prefix="pastkey-"))
        self.remove = weakref.finalize(self, _remove, self.path, os.getpid())


def _remove(folder: Path, made_by: int) -> None:
    if os.getpid() == made_by:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class BundleArgument:
    """The argument of `load`, on disk."""

    path: Path  # a bundle folder, or a zip file of one
    name: str  # in messages
    temporary: TemporaryFolder | None = None  # that the path is in


def given_as(path: Any) -> BundleArgument:
    """Writes bytes to a temporary folder, unread. A path stays as it is."""
    if isinstance(path, bytes | bytearray | memoryview):
        temporary = TemporaryFolder()
        target = temporary.path / "bundle.zip"
        target.write_bytes(path)
        return BundleArgument(target, "the bytes", temporary)
    found = as_path(path, expected="the path of a bundle folder, or of a zip file of one")
    return BundleArgument(found, str(found))


def unpacked(given: BundleArgument) -> tuple[Path, TemporaryFolder | None]:
    """The bundle's folder, and the temporary folder that it is in, if any. Raises as `unpack`."""
    if not given.path.is_file():
        return given.path, given.temporary
    import zipfile

    if given.temporary is None and not zipfile.is_zipfile(given.path):
        return given.path, given.temporary
    temporary = given.temporary or TemporaryFolder()
    folder = temporary.path / "unpacked"
    with given.path.open("rb") as file:
        folder = unpack(file, given.name, folder)
    if given.temporary is not None:
        given.path.unlink()
    return folder, temporary


def tell_as_given(error: BaseException, folder: Path, name: str) -> None:
    """Replaces the temporary folder in an error message by the name that the user gave."""
    if isinstance(error, PastkeyError):
        error.args = (str(error).replace(str(folder), name), *error.args[1:])


def unpack(file: IO[bytes], name: str, folder: Path) -> Path:
    """Writes the manifest's folder in a zip file below an empty folder. Returns where it is.

    Raises:
        InputError: It is not a zip file.
        MissingFileError: It has no bundle.
        IntegrityError: It was truncated or altered, or unpacks to too many bytes.
    """
    import zipfile

    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        raise InputError(f"{name:.60} are not a zip file of a bundle folder") from None
    with archive, reading(name, "a zip file of a bundle"):
        size = file.seek(0, os.SEEK_END)
        manifest = min((entry for entry in archive.namelist() if Path(entry).name == MANIFEST), key=len, default=None)
        if manifest is None:
            raise MissingFileError(f"{name} holds no bundle: it has no {MANIFEST}")
        root = manifest.removesuffix(MANIFEST)
        entries = [entry for entry in archive.infolist() if entry.filename.startswith(root) and not entry.is_dir()]
        for entry in entries:
            if entry.compress_type not in _METHODS:
                raise InputError(
                    f"{name} has {shown(entry.filename)} in the compression {entry.compress_type}; none (0) or deflate "
                    "(8) was expected: pack the folder again, as by  python -m zipfile -c bundle.zip bundle"
                )
        # No entry is read beyond the size that it claims.
        taken = sum(entry.file_size + _BLOCK * len(Path(entry.filename).parts) for entry in entries)
        if taken > _MOST_TIMES * size + _ALWAYS:
            raise IntegrityError(
                f"{name} would be unpacked to more than {_MOST_TIMES} times its {size:,} bytes: no bundle is, and it "
                "is not unpacked"
            )
        try:
            written = {entry.filename: archive.extract(entry, folder) for entry in entries}  # never outside of it
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno in _DISK:
                raise
            raise IntegrityError(
                f"{name} cannot be unpacked ({first_line(error, 100)}): it was cut or altered"
            ) from None
        return Path(written[manifest]).parent

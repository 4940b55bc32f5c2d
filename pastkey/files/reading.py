"""Reads untrusted files: only regular files, of bounded size, with one sentence for any error of a parser.

Parsers raise errors of every kind for damaged bytes, and those in Rust panic, which is a BaseException. Only
`reading(file)` turns them into sentences. `last_read()` names the file if an error slips through.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ..errors import InputError, IntegrityError, MissingFileError, PastkeyError, first_line
from ..values import is_unicode

MOST_JSON: Final = 100_000_000  # bytes of a JSON file that is read as a whole, and of a safetensors header
_DEEPEST: Final = 100  # nested lists and objects

_last: list[Path] = []


def last_read() -> Path | None:
    """Returns the file that pastkey opened last."""
    return _last[-1] if _last else None


def note_reading(path: str | Path) -> None:
    """Remembers which file is being read."""
    _last[:] = [Path(path)]


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust panicked. A panic is a BaseException, so `except Exception` misses it."""
    return type(error).__module__ == "pyo3_runtime"


class NativeError(Exception):
    """A panic as an Exception, with the library's message."""


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raises NativeError instead of a panic."""
    try:
        yield
    except BaseException as error:
        if is_panic(error):
            raise NativeError(first_line(error)) from None
        raise


@contextlib.contextmanager
def reading(path: str | Path, expected: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Raises IntegrityError with the file's name for any error of a parser, including a panic.

    `expected` is the kind of file. pastkey's own errors, errors of the system, and `but` pass through.
    """
    note_reading(path)
    try:
        yield
    except BaseException as error:
        of_system = isinstance(error, OSError) and error.errno is not None  # a damaged archive has no number
        if of_system or isinstance(error, (PastkeyError, MemoryError, Warning, *but)):
            raise
        if isinstance(error, Exception) or is_panic(error):
            raise IntegrityError(
                f"{path} cannot be read as {expected} ({first_line(error)}): it was damaged or altered, copy it again"
            ) from error
        raise


def require_regular(path: Path) -> os.stat_result:
    """Returns the stat of a file. Raises MissingFileError, or InputError for a folder, a device or a pipe."""
    note_reading(path)
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"no such file: {path}") from None
    except ValueError:  # a name with a NUL
        raise InputError(f"{str(path)!r} is not the name of a file") from None
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"{path} is a folder; a file was expected")
    if stat.S_ISFIFO(found.st_mode) or stat.S_ISSOCK(found.st_mode):
        raise InputError(
            f"{path} is a pipe, which can be read once and may never end: write its output to a file first"
        )
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is a device, which may never end: give a regular file")
    return found


def read_bytes(path: Path, most: int) -> bytes:
    """Returns a regular file's content. Raises InputError if it is larger than `most` bytes, or MissingFileError."""
    size = require_regular(path).st_size
    if size > most:
        raise InputError(f"{path} has {size:,} bytes; at most {most:,} are allowed")
    with path.open("rb") as file:
        return file.read(most + 1)[:most]  # it may grow meanwhile


def parse_json(content: bytes | str, source: object) -> Any:
    """Parses the JSON value in `content`. Raises IntegrityError naming `source`.

    All later code can handle the values that pass: at most _DEEPEST nested lists and objects, and no text with half a
    surrogate pair, which cannot be printed.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        reason = f"nested more than {_DEEPEST} deep" if isinstance(error, RecursionError) else error
        raise IntegrityError(f"{source} is not valid JSON ({reason}): it was cut short or altered") from None
    level, depth = [value], 0
    surrogates = "\\ud" in text or "\\uD" in text  # other forms fail to decode
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise IntegrityError(
                f"{source} is not valid JSON (nested more than {_DEEPEST} deep): it was cut short or altered"
            )
        below: list[Any] = []
        for found in level:
            if isinstance(found, dict):
                below += found.values()
                below += found if surrogates else ()
            elif isinstance(found, list):
                below += found
            elif surrogates and isinstance(found, str) and not is_unicode(found):
                raise IntegrityError(
                    f"{source} is not valid JSON (half a surrogate pair in a text): it was cut short or altered"
                )
        level = below
    return value

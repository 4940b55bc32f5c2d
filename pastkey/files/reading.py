"""Reading untrusted files: regular files only, of bounded size, and one sentence for what a library says of it.

Parsers of other people raise errors of every kind for damaged bytes, and those in Rust panic, which is a BaseException.
`reading(file)` is the one place that makes a sentence of them all. `last_read()` names the file where an error slips
through.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ..errors import InputError, IntegrityError, MissingFileError, PastkeyError, first_line
from ..values import is_unicode

MOST_JSON: Final = 100_000_000  # bytes of a JSON file that is read as a whole, and of a safetensors header
_DEEPEST: Final = 100  # lists and objects within one another

_last: list[Path] = []


def last_read() -> Path | None:
    """The file that was opened last by anything of pastkey."""
    return _last[-1] if _last else None


def note_reading(path: str | Path) -> None:
    """Remembers which file is read from now on."""
    _last[:] = [Path(path)]


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust panicked. That is a BaseException, so that `except Exception` misses it."""
    return type(error).__module__ == "pyo3_runtime"


class NativeError(Exception):
    """A panic as an Exception, in the library's words."""


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raises NativeError in place of a panic."""
    try:
        yield
    except BaseException as error:
        if is_panic(error):
            raise NativeError(first_line(error)) from None
        raise


@contextlib.contextmanager
def reading(path: str | Path, expected: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Raises IntegrityError with the file's name for whatever a parser says of its bytes, a panic included.

    `expected` is what the file should be. What is a sentence already goes through, what the system says, and `but`.
    """
    note_reading(path)
    try:
        yield
    except BaseException as error:
        if isinstance(error, (PastkeyError, OSError, MemoryError, Warning, *but)):
            raise
        if isinstance(error, Exception) or is_panic(error):
            raise IntegrityError(
                f"{path} cannot be read as {expected} ({first_line(error)}): it was damaged or altered, copy it again"
            ) from error
        raise


def require_regular(path: Path) -> os.stat_result:
    """What the system says of a file. Raises MissingFileError, or InputError for a folder, a device or a pipe."""
    note_reading(path)
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"no such file: {path}") from None
    except ValueError:  # a name with a NUL
        raise InputError(f"{str(path)!r} is not the name of a file") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(f"{path} is a link that leads back to itself; a regular file was expected") from None
        raise
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"{path} is a folder; a file was expected")
    if stat.S_ISFIFO(found.st_mode) or stat.S_ISSOCK(found.st_mode):
        raise InputError(
            f"{path} is a pipe, which can be read once and may never end: write what comes out of it to a file first"
        )
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is a device, which need not end: give a regular file")
    return found


def read_bytes(path: Path, most: int) -> bytes:
    """A regular file's content. Raises InputError where it has more than `most` bytes, MissingFileError without one."""
    size = require_regular(path).st_size
    if size > most:
        raise InputError(f"{path} has {size:,} bytes, and {most:,} are the most that are read of such a file")
    with path.open("rb") as file:
        return file.read(most + 1)[:most]  # it may grow meanwhile


def parse_json(content: bytes | str, source: object) -> Any:
    """The JSON value in `content`. Raises IntegrityError naming `source`.

    Values are those that all later code can take: at most _DEEPEST lists and objects within one another, and no text
    with half a surrogate pair, which nothing can print.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # of a number of thousands of digits, too
        reason = f"nested more than {_DEEPEST} deep" if isinstance(error, RecursionError) else error
        raise IntegrityError(f"{source} is not valid JSON ({reason}): it was cut short or altered") from None
    level, depth = [value], 0
    surrogates = "\\ud" in text or "\\uD" in text  # any other would not have been decoded
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

"""The sensitivity table, as a JSON file."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from pastkey.errors import InputError, MissingFileError
from pastkey.files.durable import write_json

from .ranking.sensitivity import Sensitivity


def check_report_file(file: str | Path, out: str | Path, read: Sequence[object]) -> None:
    """Checks the path of the report before the export starts.

    Args:
        file: The path given to --sensitivity.
        out: The bundle's folder, which is replaced as a whole.
        read: The source and its files, as the user gave them: those that are paths must not be overwritten.

    Raises:
        InputError: The file cannot be written, or its name is invalid.
        MissingFileError: Its folder does not exist.
    """
    path, target = Path(file), Path(file).resolve()
    within = (target, *target.parents)
    if path.suffix.lower() != ".json":
        raise InputError(f"--sensitivity {path}: a name that ends in .json was expected")
    if path.is_dir():
        raise InputError(f"--sensitivity {path} is a folder; the name of a file was expected")
    if not path.parent.is_dir():
        raise MissingFileError(f"--sensitivity {path}: the folder {path.parent} does not exist")
    if Path(out).resolve() in within:
        raise InputError(f"--sensitivity {path} lies in the bundle {out}, which is replaced: put it beside that")
    if any(Path(item).resolve() in within for item in read if isinstance(item, (str, Path))):
        raise InputError(f"--sensitivity {path} is part of what is to be exported: choose another name")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(
            f"--sensitivity {path} cannot be written there ({error.strerror}): choose another folder"
        ) from None


def write_report(path: Path, table: Sensitivity) -> None:
    """Writes the table. Replaces an existing file atomically."""
    with tempfile.TemporaryDirectory(prefix=".pastkey-", dir=path.parent) as folder:
        made = Path(folder) / path.name
        write_json(made, table.to_json())
        made.replace(path)

"""The place of the sensitivity table."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from pastkey.errors import InputError


def check_report_file(file: str | Path, out: str | Path, read: Sequence[object]) -> None:
    """Checks the path of the report before the export starts.

    Args:
        file: The path given to --sensitivity.
        out: The bundle's folder, which is replaced as a whole.
        read: The source and its files, as the user gave them: those that are paths must not be overwritten.

    Raises:
        InputError: The file cannot be written.
    """
    path, target = Path(file), Path(file).resolve()
    within = (target, *target.parents)
    if path.is_dir():
        raise InputError(f"--sensitivity {path} is a folder; the name of a file was expected")
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

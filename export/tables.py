"""The table of what each matrix costs in int8 or int4, as files: JSON, or a chart."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pastkey.errors import InputError, MissingFileError
from pastkey.folder import write_json

from .sensitivity import Sensitivity

_ENDINGS = (".json", ".png")


def check_tables(
    files: Sequence[str | Path], precision: str, out: str | Path, read: Sequence[object]
) -> tuple[Path, ...]:
    """The files to write, looked at before the work. Raises InputError or MissingFileError where one cannot be.

    `out` is the bundle's folder, which is replaced as a whole; `read` are the source and the files that belong to it,
    as the user gave them: those that are paths are not written to.
    """
    inputs = [Path(item).resolve() for item in read if isinstance(item, (str, Path))]
    paths = tuple(Path(file) for file in files)
    if paths and precision == "fp32":
        raise InputError("--sensitivity tells what int8 costs: leave it out, or export with --precision int8")
    for path in paths:
        if path.suffix not in _ENDINGS:
            raise InputError(f"--sensitivity {path}: a name that ends in {' or '.join(_ENDINGS)} was expected")
        if path.is_dir():
            raise InputError(f"--sensitivity {path} is a folder; the name of a file was expected")
        if not path.parent.is_dir():
            raise MissingFileError(f"--sensitivity {path}: there is no folder {path.parent} to write it to")
        if Path(out).resolve() in path.resolve().parents:
            raise InputError(f"--sensitivity {path} lies in the bundle {out}, which is replaced: put it beside that")
        if any(known in (path.resolve(), *path.resolve().parents) for known in inputs):
            raise InputError(f"--sensitivity {path} is part of what is to be exported: choose another name")
        try:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise InputError(
                f"--sensitivity {path} cannot be written there ({error.strerror}): choose another folder"
            ) from None
        if path.suffix == ".png":
            importlib.import_module("matplotlib")
    return paths


def write_table(path: Path, table: Sensitivity) -> None:
    """Writes one of them, by its ending. A file that was there is replaced."""
    with tempfile.TemporaryDirectory(prefix=".pastkey-", dir=path.parent) as folder:
        made = Path(folder) / path.name
        if path.suffix == ".json":
            write_json(made, table.to_json())
        else:
            from .chart import draw

            draw(made, table)
        made.replace(path)

"""The table of what each matrix costs in int8 or int4, as files: JSON, or a chart."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from pastkey.errors import InputError, MissingFileError
from pastkey.folder import write_json

from .sensitivity import Sensitivity

_ENDINGS = (".json", ".png")


def check_tables(files: Sequence[str | Path], precision: str) -> tuple[Path, ...]:
    """The files to write, looked at before the work. Raises InputError or MissingFileError where one cannot be."""
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
        if path.suffix == ".png":
            importlib.import_module("matplotlib")
    return paths


def write_table(path: Path, table: Sensitivity) -> None:
    """Writes one of them, by its ending. A file that was there is replaced."""
    if path.suffix == ".json":
        write_json(path, table.to_json())
        return
    from .chart import draw

    partial = path.with_name(path.name + ".new")
    try:
        draw(partial, table)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

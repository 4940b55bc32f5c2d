"""The table of what each matrix costs in int8 or int4, as files: JSON, or a chart."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from pastkey.errors import InputError, MissingFileError
from pastkey.folder import write_json

from .sensitivity import Sensitivity

_ENDINGS = (".json", ".png")


def check_tables(files: Sequence[str | Path], precision: str, out: str | Path) -> tuple[Path, ...]:
    """The files to write, looked at before the work. Raises InputError or MissingFileError where one cannot be.

    `out` is the bundle's folder, which is replaced as a whole.
    """
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
        try:
            _partial(path).touch()
        except OSError as error:
            raise InputError(
                f"--sensitivity {path} cannot be written there ({error.strerror}): choose another folder"
            ) from None
        _partial(path).unlink()
        if path.suffix == ".png":
            importlib.import_module("matplotlib")
    return paths


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def write_table(path: Path, table: Sensitivity) -> None:
    """Writes one of them, by its ending. A file that was there is replaced."""
    if path.suffix == ".json":
        write_json(path, table.to_json())
        return
    from .chart import draw

    partial = _partial(path)
    try:
        draw(partial, table)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

"""Changing one file of a bundle, and what is then said of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from pastkey.contract import names
from pastkey.export.compat.check import Verdict, check
from pastkey.files.folder import file_records
from pastkey.precisions import PRECISIONS


def edit(folder: Path, file: str, change: Callable[[Any], object]) -> None:
    """Changes one JSON file in place."""
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    change(content)
    (folder / file).write_text(json.dumps(content), encoding="utf-8")


def edit_graph(folder: Path, change: Callable[[onnx.GraphProto], object], precision: str = "int8") -> None:
    path = folder / PRECISIONS[precision].graph
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    onnx.save(model, path)


def record(folder: Path) -> None:
    """Lists the files as they are now: what is judged is their content, not that they were altered."""
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != names.MANIFEST]
    edit(folder, names.MANIFEST, lambda c: c.update(files=file_records(folder, files)))


def verdicts(folder: Path) -> dict[str, Verdict]:
    return {verdict.program: verdict for verdict in check(folder)}


def graph_input(graph: onnx.GraphProto, name: str) -> onnx.ValueInfoProto:
    return next(value for value in graph.input if value.name == name)

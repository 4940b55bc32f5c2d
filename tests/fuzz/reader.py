"""One reader as a function of the bytes of one file, and the place where files for it are written."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pastkey.contract import names

from .mutations import Mutation


@dataclass(frozen=True)
class Target:
    """A reader."""

    read: Callable[[bytes], object]
    valid: Callable[[], bytes]  # a file that it takes
    mutate: Mutation
    native: bool = False  # a library that is not in Python reads the bytes, so that it may run long, or end the process


@functools.cache
def workplace() -> Path:
    """A folder of this process, removed at its end."""
    folder = tempfile.TemporaryDirectory(prefix="pastkey-fuzz-")
    _kept.append(folder)
    os.environ["XDG_CACHE_HOME"] = os.devnull  # nothing is remembered, so that every input is hashed
    return Path(folder.name)


_kept: list[Any] = []


def written(name: str, content: bytes) -> Path:
    file = workplace() / name
    file.write_bytes(content)
    return file


def json_bytes(value: object) -> Callable[[], bytes]:
    return lambda: json.dumps(value).encode()


def _mended(folder: Path, file: str, content: bytes) -> None:
    """Writes one file and what its manifest says of it."""
    (folder / file).write_bytes(content)
    manifest = json.loads(_original(folder))
    record = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for records in (manifest["files"], manifest.get("training", {}).get("files", {})):
        if file in records:
            records[file] = record
    (folder / names.MANIFEST).write_text(json.dumps(manifest))


@functools.cache
def _original(folder: Path) -> bytes:
    return (folder / names.MANIFEST).read_bytes()


@contextlib.contextmanager
def changed(folder: Path, file: str, content: bytes) -> Iterator[None]:
    """The folder with this content in one file, which its manifest lists so, unless it is the manifest itself."""
    whole = (folder / file).read_bytes()
    _original(folder)
    try:
        if file == names.MANIFEST:
            (folder / file).write_bytes(content)
        else:
            _mended(folder, file, content)
        yield
    finally:
        (folder / file).write_bytes(whole)
        (folder / names.MANIFEST).write_bytes(_original(folder))

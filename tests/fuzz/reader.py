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


def alone(file: str, read: Callable[[Path], object], valid: bytes, mutate: Mutation) -> Target:
    """A reader of one file."""
    return Target(lambda content: read(written(file, content)), lambda: valid, mutate)


def within(folder: Callable[[], Path], file: str, read: Callable[[Path], object], mutate: Mutation) -> Target:
    """A reader of a folder, in one file of which the bytes are."""

    def read_changed(content: bytes) -> object:
        with changed(folder(), file, content):
            return read(folder())

    return Target(read_changed, lambda: (folder() / file).read_bytes(), mutate)


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
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    return file


def json_bytes(value: object) -> bytes:
    return json.dumps(value).encode()


@contextlib.contextmanager
def changed(folder: Path, file: str, content: bytes) -> Iterator[None]:
    """The folder with this content in one file, which its manifest lists so, if it has another one."""
    manifest = folder / names.MANIFEST
    before = {path: path.read_bytes() for path in (folder / file, manifest) if path.exists()}
    try:
        (folder / file).write_bytes(content)
        if manifest in before and file != names.MANIFEST:
            listed = json.loads(before[manifest])
            for records in (listed["files"], listed.get("training", {}).get("files", {})):
                if file in records:
                    records[file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            manifest.write_text(json.dumps(listed))
        yield
    finally:
        for path, whole in before.items():
            path.write_bytes(whole)

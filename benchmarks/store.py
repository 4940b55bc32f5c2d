"""Finished steps on disk, so that an interrupted run continues where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pastkey.errors import InputError
from pastkey.files.durable import write_json


class Store:
    """A work folder: steps/NAME.json holds the result of a step and the key that it belongs to.

    A key says everything that the result depends on. A step whose key has changed is done again.
    """

    def __init__(self, folder: Path) -> None:
        """Raises InputError where no folder can be."""
        self.folder = folder = folder.resolve()  # other programs are given paths in it
        self.steps, self.models, self.logs = (folder / name for name in ("steps", "models", "logs"))
        for part in (self.steps, self.models, self.logs):
            try:
                part.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"{part} cannot be made a folder ({error.strerror}): give another --work") from None

    def once(self, name: str, make: Callable[[], Any], *, key: Any, product: Path | None = None) -> Any:
        """The result of a step: as it was stored under this key, or else made now and stored, both by way of JSON.

        A step whose `product`, a file or folder that it writes, is gone is done again.
        """
        file = self.steps / f"{name.replace(' ', '-')}.json"
        wanted = json.loads(json.dumps(key))
        if file.is_file() and (product is None or product.exists()):
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["key"] == wanted:
                return found["value"]
        value = json.loads(json.dumps(make()))  # as it will be read
        write_json(file, {"key": wanted, "value": value})
        return value


def digest(content: Any) -> str:
    """A short name for anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def digest_of_files(path: Path) -> str:
    """A short name for the content of a file, or of the files of a folder and their names."""
    total = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]:
        total.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()[:12]

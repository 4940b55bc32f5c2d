"""Shared by the tests of sources."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from pastkey.contract import names
from pastkey.errors import PastkeyError
from pastkey.export.source.open import open_source
from pastkey.export.source.source import Opening, Source

Refused = tuple[Callable[[Path], Any], type[PastkeyError], str]  # the damage, the class, key words


def opened(source: Any, **settings: Any) -> Source:
    return open_source(source, Opening(**({"context_length": 8} | settings)))


def refusal(kind: type[PastkeyError], source: Any, **settings: Any) -> str:
    """The sentence for a source that is refused."""
    with pytest.raises(kind) as caught:
        opened(source, **settings)
    return str(caught.value)


def write(path: Path, content: str | bytes | object) -> Path:
    """Writes a text, bytes, or anything else as JSON."""
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def change(file: Path, **entries: Any) -> Path:
    """Overwrites entries of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | entries
    return write(file, {key: value for key, value in content.items() if value is not None})


def link_out(folder: Path, name: str) -> Path:
    """Replaces a file by a link, to its content or a secret outside of the folder. Returns its target."""
    file, target = folder / name, folder.parent / "secret"
    file.parent.mkdir(exist_ok=True)
    if file.exists():
        file.rename(target)
    else:
        target.write_text("{}")
    file.symlink_to(target)
    return target


class Runs:
    """Calls a function when a pickle of it is read as pickles are."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        function, *arguments = self.call
        return function, tuple(arguments)


def save(tokenizer: Tokenizer, folder: Path, **config: Any) -> Path:
    """Writes tokenizer.json, and a configuration if there is one."""
    tokenizer.save(str(folder / names.TOKENIZER))
    if config:
        write(folder / names.TOKENIZER_CONFIG, config)
    return folder / names.TOKENIZER


def write_notebook(path: Path, *cells: str) -> Path:
    content = [{"cell_type": "markdown", "source": ["# A lesson"]}]
    content += [{"cell_type": "code", "source": cell.splitlines(keepends=True)} for cell in cells]
    return write(path, {"cells": content, "nbformat": 4})

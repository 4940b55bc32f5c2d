"""What the tests of sources share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from pastkey.contract import names
from pastkey.errors import PastkeyError
from pastkey.export.source.open import open_source
from pastkey.export.source.source import Opening, Source


def opened(source: Any, **settings: Any) -> Source:
    return open_source(source, Opening(**({"context_length": 8} | settings)))


def refusal(kind: type[PastkeyError], source: Any, **settings: Any) -> str:
    """The sentence for a source that is refused."""
    with pytest.raises(kind) as caught:
        opened(source, **settings)
    return str(caught.value)


def save(tokenizer: Tokenizer, folder: Path, **config: Any) -> Path:
    """Writes tokenizer.json, and a configuration if there is one."""
    tokenizer.save(str(folder / names.TOKENIZER))
    if config:
        (folder / names.TOKENIZER_CONFIG).write_text(json.dumps(config))
    return folder / names.TOKENIZER


def write_notebook(path: Path, *cells: str) -> Path:
    content = [{"cell_type": "markdown", "source": ["# A lesson"]}]
    content += [{"cell_type": "code", "source": cell.splitlines(keepends=True)} for cell in cells]
    path.write_text(json.dumps({"cells": content, "nbformat": 4}))
    return path

"""What the tests of data share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pastkey.train.data.documents import Document, document_of
from pastkey.train.data.sources import Corpus, survey
from pastkey.train.data.token_files import DataInfo
from pastkey.train.data.tokenizing import write_tokens
from pastkey.train.tokenizer import TextTokenizer, train_char


def corpus_of(*documents: str | Mapping[str, Any]) -> Corpus:
    """A corpus of texts, or of rows as in JSON lines."""
    found = [
        Document("test", row) if isinstance(row, str) else document_of(row, f"row {number}")
        for number, row in enumerate(documents, 1)
    ]
    return Corpus("test", lambda: iter(found))


def texts(corpus: Corpus) -> list[str]:
    return [text for document in corpus.documents() for text in document.texts()]


def written(folder: Path, corpus: Corpus, context: int = 8, tokenizer: TextTokenizer | None = None) -> DataInfo:
    tokenizer = tokenizer or train_char(texts(corpus))
    return write_tokens(folder, corpus, survey(corpus), tokenizer, context)


def ids(folder: Path, name: str, info: DataInfo) -> list[int]:
    return [int(token) for token in np.fromfile(folder / name, info.dtype)]


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

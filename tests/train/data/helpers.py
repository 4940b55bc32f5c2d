"""What the tests of data share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pastkey.train.data.documents import document_of
from pastkey.train.data.examples import Example
from pastkey.train.data.sources import Corpus, open_corpus, survey
from pastkey.train.data.token_files import DataInfo
from pastkey.train.data.tokenizing import write_tokens
from pastkey.train.tokenizer import TextTokenizer, train_bpe, train_char


def corpus_of(*documents: str | Mapping[str, Any]) -> Corpus:
    """A corpus of texts, or of rows as in JSON lines."""
    rows = [{"text": row} if isinstance(row, str) else row for row in documents]
    found = [document_of(row, f"row {number}") for number, row in enumerate(rows, 1)]
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


def weighted(folder: Path, **rows: Sequence[Any]) -> Corpus:
    """The corpus of a.jsonl with the weight 3 and of b.jsonl with the weight 1."""
    files = [write_lines(folder / f"{name}.jsonl", rows[name]) for name in "ab"]
    return open_corpus([f"{file}={weight}" for file, weight in zip(files, (3, 1), strict=True)])


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same text, with the assistant's marked.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(template: str | None = CHATML) -> TextTokenizer:
    """Byte-level BPE with the tokens of ChatML, for tests that render templates."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    made = train_bpe(["the cat sat on the mat", "a dog saw a cat"], 280)
    made.tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return replace(made, chat_template=template)


def chat(*contents: str) -> dict[str, Any]:
    """A row of a conversation: the user's and the assistant's messages in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]}


def trained_text(example: Example, tokenizer: TextTokenizer) -> list[str]:
    """The texts of an example's runs of trained tokens."""
    pairs = zip(example.ids.tolist(), example.trained.tolist(), strict=True)
    runs = [[token for token, _ in run] for trained, run in groupby(pairs, lambda pair: pair[1]) if trained]
    return [tokenizer.tokenizer.decode(run, skip_special_tokens=False) for run in runs]

"""From the files of --data to a tokenizer and token files in a checkpoint's folder."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from pastkey.command import say
from pastkey.contract import names
from pastkey.errors import InputError

from ..checkpoint import TOKENS_TRAIN, TOKENS_VAL
from ..settings import TrainConfig
from ..tokenizer import KINDS, LESSON_END, TextTokenizer, lesson_tokenizer, make_tokenizer, read_tokenizer
from . import cache
from .preview import show_example
from .sources import Corpus, open_corpus, story_corpus, survey
from .token_files import DataInfo
from .tokenizing import write_tokens

LESSON: Final = (
    f"what is statquest {LESSON_END} awesome {LESSON_END}",
    f"statquest is what {LESSON_END} awesome {LESSON_END}",
)
LESSON_PROMPTS: Final = ("what is statquest", "statquest is what")
_TOKENIZER_BYTES: Final = 200_000_000  # of text that a tokenizer learns from; of a larger corpus every n-th document


def prepare(
    config: TrainConfig,
    folder: Path,
    data: Sequence[str | Path],
    tokenizer: TextTokenizer | None = None,
    context: int | None = None,
) -> tuple[DataInfo, TextTokenizer]:
    """Writes the tokenizer and the token files into `folder`, from the cache if it has them.

    Args:
        config: The settings.
        folder: A checkpoint's folder.
        data: Files and folders, each as PATH or PATH=WEIGHT; empty for the preset's built-in corpus.
        tokenizer: The one to use; None makes the one that the settings name.
        context: Tokens of a window; None: the model's context.

    Raises InputError or MissingFileError.
    """
    if config.preset == "classic" and not data:
        _check_lesson(config)
        tokenizer = lesson_tokenizer()
        tokenizer.save(folder)
        return write_lesson(folder, tokenizer), tokenizer
    corpus = open_corpus(data) if data else story_corpus(config.seed)
    if tokenizer is None and config.tokenizer not in KINDS:
        tokenizer = read_tokenizer(Path(config.tokenizer))
    if context is None:
        context = config.model_config(1, None, 0).max_position_embeddings
    entry = cache.cache_entry(corpus, config, tokenizer, context)
    info = cache.take(entry, folder)
    if info is not None:
        say(f"read the tokens of {corpus.name} from {entry}")
        info = dataclasses.replace(info, corpus=corpus.name)
        tokenizer = read_tokenizer(folder / names.TOKENIZER)
    else:
        info, tokenizer = _tokenized(config, folder, corpus, tokenizer, context)
        cache.keep(entry, folder, info)
    tokenizer = dataclasses.replace(tokenizer, begin=info.begin, end=info.end)
    if info.masked:
        show_example(folder, info, tokenizer)
    return info, tokenizer


def _tokenized(
    config: TrainConfig, folder: Path, corpus: Corpus, tokenizer: TextTokenizer | None, context: int
) -> tuple[DataInfo, TextTokenizer]:
    found = survey(corpus)
    if tokenizer is None:
        # Characters come from the whole corpus: any other one would be an error.
        every = 1 if config.tokenizer == "char" else -(-found.size // _TOKENIZER_BYTES)
        documents = itertools.islice(corpus.documents(), None, None, every)
        texts = (text for document in documents for text in document.texts())
        tokenizer = make_tokenizer(config.tokenizer, texts, config.vocab_size)
    info = write_tokens(folder, corpus, found, tokenizer, context)
    tokenizer = dataclasses.replace(tokenizer, end=info.end)
    tokenizer.save(folder)
    return info, tokenizer


def require_same_data(data: Sequence[str | Path], info: DataInfo) -> None:
    """Raises InputError if these files, or their weights, are not those of the token files."""
    corpus = open_corpus(data)
    if survey(corpus).fingerprint != info.fingerprint:
        raise InputError(f"the run was started on other text ({info.corpus}): start a new run for new text")
    before = [source.weight for source in info.sources]
    if [source.weight for source in corpus.weighted] != before:
        shown = ", ".join(map(str, before)) or "no weights"
        raise InputError(f"the run was started with {shown} for its sources: leave --data out, or start a new run")


# --- the classic lesson -----------------------------------------------------------------------------------------------
def _check_lesson(config: TrainConfig) -> None:
    if config.tokenizer != "word":
        raise InputError(
            f"the classic lesson is tokenized by words, not with --tokenizer {config.tokenizer}: leave it out"
        )
    needed = max(len(row.split()) for row in LESSON)
    if config.context is not None and config.context < needed:
        raise InputError(f"--context {config.context} is too short for the classic lesson, which needs {needed} tokens")


def write_lesson(folder: Path, tokenizer: TextTokenizer) -> DataInfo:
    """Writes the classic lesson as rows of tokens. Both of its sentences are also the validation set."""
    rows = np.array([tokenizer.encode(sentence) for sentence in LESSON], "<u2")
    (folder / TOKENS_TRAIN).parent.mkdir(exist_ok=True)
    for name in (TOKENS_TRAIN, TOKENS_VAL):
        (folder / name).write_bytes(rows.tobytes())
    text = "\n".join(LESSON).encode()
    return DataInfo(
        corpus="the classic lesson",
        fingerprint=hashlib.sha256(text).hexdigest(),
        documents=len(LESSON),
        dtype="<u2",
        train_tokens=rows.size,
        val_tokens=rows.size,
        val_bytes=len(text),
        begin=tokenizer.begin,
        end=tokenizer.end,
        row_length=rows.shape[1],
    )

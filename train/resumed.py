"""Checks the training state of a checkpoint before the next step: the file may be damaged or altered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from pastkey.contract import names
from pastkey.errors import InputError, IntegrityError
from pastkey.typed import parse
from pastkey.values import is_int

from .checkpoint import TOKENS_TRAIN, TOKENS_VAL, Checkpoint, load_optimizer
from .data.token_files import DataInfo
from .pretrained import FineTuned
from .settings import TrainConfig


@dataclass(frozen=True)
class Resumed:
    """A training that can continue."""

    config: TrainConfig
    info: DataInfo
    step: int
    moments: Mapping[str, Tensor]


def read_training(checkpoint: Checkpoint | FineTuned) -> Resumed:
    """Reads the training state. Raises InputError if there is none, IntegrityError if it is inconsistent."""
    folder, training = checkpoint.path, checkpoint.training
    if not {"step", "settings", "data", "files"} <= set(training):
        raise InputError(f"{folder} has no training state to resume from: it has only the model")
    try:
        config = parse(TrainConfig, training["settings"], "settings")
        info = parse(DataInfo, training["data"], "data")
    except InputError as error:
        raise IntegrityError(
            f"{folder / names.MANIFEST} is not valid: {error}; it was altered, copy it again"
        ) from None
    step = training["step"]
    if not is_int(step, 0, 2**63 - 1):
        raise IntegrityError(f"{folder / names.MANIFEST} is not valid: step is not a whole number; copy it again")
    moments = load_optimizer(folder, training)
    for name, tokens in ((TOKENS_TRAIN, info.train_tokens), (TOKENS_VAL, info.val_tokens)):
        context = config.context or checkpoint.config.max_position_embeddings
        _check_tokens(folder / name, info, tokens, context, checkpoint.config.vocab_size)
    return Resumed(config, info, step, moments)


def _check_tokens(file: Path, info: DataInfo, tokens: int, context: int, vocab_size: int) -> None:
    """Raises IntegrityError if a token file's length differs from the manifest's, or its ids exceed the vocabulary."""
    if info.sources and sum(source.tokens for source in info.sources) != info.train_tokens:
        raise IntegrityError(f"the sources of {file} do not add up to its tokens: it was altered, copy it again")
    size, rows = file.stat().st_size, info.row_length or 1
    enough = tokens >= 2 and (info.row_length is not None or file.name != Path(TOKENS_TRAIN).name or tokens > context)
    if tokens * np.dtype(info.dtype).itemsize != size or not enough or tokens % rows or rows > context + 1:
        raise IntegrityError(
            f"{file} has {size:,} bytes, which are not the {tokens:,} tokens that the manifest lists, or too few "
            "to train on: it was altered, copy the checkpoint again"
        )
    ids = np.memmap(file, info.dtype, "r")
    largest = max(int(ids.max()), ~int(ids.min()) if info.masked else 0)
    ends = [token for token in (info.begin, info.end) if token is not None]
    if max(largest, *ends) >= vocab_size or (info.row_length is not None and rows < 2):
        raise IntegrityError(
            f"{file} holds the token id {max(largest, *ends)}, and the model has {vocab_size} embeddings: it is "
            "another model's, copy the checkpoint again"
        )

"""The training state of a checkpoint is checked before the first step."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from pastkey.errors import InputError, IntegrityError
from pastkey.train import resumed
from pastkey.train.checkpoint import TOKENS_TRAIN, Checkpoint, load_checkpoint
from pastkey.train.data.token_files import DataInfo
from pastkey.train.resumed import Resumed, read_training
from pastkey.train.settings import TrainConfig

from ..wrong_values import without, wrong_fields
from .helpers import tiny


@pytest.fixture
def read(copy, monkeypatch):
    """Reads the training with parts of it changed, of a checkpoint whose moments are those that it was saved with."""
    checkpoint: Checkpoint = load_checkpoint(copy)
    moments = resumed.load_optimizer(copy, checkpoint.training)
    monkeypatch.setattr(resumed, "load_optimizer", lambda folder, training: moments)

    def reading(**parts: Any) -> Resumed:
        return read_training(dataclasses.replace(checkpoint, training=checkpoint.training | parts))

    return reading


def test_a_training_is_read(read):
    found = read()
    assert (found.step, found.config) == (12, tiny())
    assert {name.rpartition(".")[2] for name in found.moments} == {"momentum", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(("part", "kind"), [("settings", TrainConfig), ("data", DataInfo)])
def test_a_field_that_is_missing_or_of_another_type_is_told_with_the_file(part, kind, read, copy):
    whole = load_checkpoint(copy).training[part]
    for name, value in [*wrong_fields(kind), ("of nobody", 1)]:
        with pytest.raises(IntegrityError, match=r"pastkey\.json is not valid"):
            read(**{part: without(whole, name, value)})


REFUSED: dict[str, tuple[str, Any, str]] = {
    "a step below 0": ("step", -1, "step is not a whole number"),
    "settings that are a list": ("settings", [], "settings is"),
    "tokens of objects": ("data", {"dtype": "|O"}, r"dtype is '\|O'; it must be one of <u2, <u4"),
    "fewer tokens": ("data", {"train_tokens": 5}, "which are not the 5 tokens"),
    "more tokens": ("data", {"val_tokens": 10**6}, "which are not the 1,000,000 tokens"),
    "rows of another length": ("data", {"row_length": 31}, "tokens that the manifest lists"),
    "rows longer than the context": ("data", {"row_length": 10**6}, "tokens that the manifest lists"),
    "sources that do not add up": ("data", {"sources": [{"name": "a", "tokens": 3}]}, "do not add up"),
    "an end token beyond the model": ("data", {"end": 10**6}, "holds the token id 1000000"),
    "a begin token beyond the model": ("data", {"begin": 10**6}, "holds the token id 1000000"),
    "a context beyond the tokens": ("settings", {"context": 10**6}, "too few"),
}


@pytest.mark.parametrize("spoilt", REFUSED)
def test_a_training_that_does_not_agree_with_its_files_is_refused(spoilt, read, copy):
    part, change, word = REFUSED[spoilt]
    value = load_checkpoint(copy).training[part] | change if isinstance(change, dict) else change
    with pytest.raises(IntegrityError, match=word):
        read(**{part: value})


def test_a_model_alone_and_ids_of_no_token_are_refused(read, copy):
    with pytest.raises(InputError, match="has only the model"):
        read_training(dataclasses.replace(load_checkpoint(copy), training={}))
    tokens = copy / TOKENS_TRAIN
    tokens.write_bytes(np.full(tokens.stat().st_size // 2, 65535, "<u2").tobytes())
    with pytest.raises(IntegrityError, match="holds the token id 65535"):
        read()

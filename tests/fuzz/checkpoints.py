"""What is in a checkpoint that training wrote."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from pastkey.contract import names
from pastkey.train.checkpoint import (
    STATE,
    TOKENS_TRAIN,
    TOKENS_VAL,
    TrainingState,
    load_checkpoint,
    save_checkpoint,
)
from pastkey.train.data.token_files import DataInfo
from pastkey.train.model import Decoder
from pastkey.train.optimizer import make_optimizers, moments_of, restore_moments
from pastkey.train.resumed import read_training
from pastkey.train.settings import TrainConfig
from pastkey.train.tokenizer import train_bpe

from .mutations import mutate_bytes, mutate_headed, mutate_json
from .reader import Target, changed, workplace
from .samples import CORPUS


@functools.cache
def checkpoint_folder() -> Path:
    folder = workplace() / "checkpoint"
    (folder / "training").mkdir(parents=True)
    tokenizer = train_bpe([CORPUS], 270)
    tokenizer.save(folder)
    config = TrainConfig.from_given(
        {"hidden_size": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "context": 16, "threads": 1}
    )
    model = Decoder(config.model_config(tokenizer.vocab_size, tokenizer.begin, tokenizer.end))
    ids = np.array(tokenizer.documents([CORPUS], ["a text"])[0], "<u2")
    for name in (TOKENS_TRAIN, TOKENS_VAL):
        (folder / name).write_bytes(ids.tobytes())
    info = DataInfo("c", "f", 1, "<u2", len(ids), len(ids), 10, tokenizer.begin, tokenizer.end)
    optimizers = make_optimizers(model, config)
    model(torch.tensor([[1, 2]]), torch.tensor([[0, 1]])).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
    moments = moments_of(optimizers, model)
    save_checkpoint(folder, model, TrainingState(3, moments, settings, info.to_json(), {"val_loss": 1.0}))
    return folder


def _in_checkpoint(file: str) -> Callable[[bytes], object]:
    def read(content: bytes) -> object:
        with changed(checkpoint_folder(), file, content):
            checkpoint = load_checkpoint(checkpoint_folder())
            resumed = read_training(checkpoint)
            restore_moments(make_optimizers(checkpoint.model, resumed.config), checkpoint.model, resumed.moments, 3)
            return resumed.step

    return read


def _of_checkpoint(file: str) -> Callable[[], bytes]:
    return lambda: (checkpoint_folder() / file).read_bytes()


CHECKPOINTS: Mapping[str, Target] = {
    "config": Target(_in_checkpoint(names.CONFIG), _of_checkpoint(names.CONFIG), mutate_json),
    "checkpoint_manifest": Target(_in_checkpoint(names.MANIFEST), _of_checkpoint(names.MANIFEST), mutate_json),
    "checkpoint_weights": Target(_in_checkpoint(names.WEIGHTS), _of_checkpoint(names.WEIGHTS), mutate_headed),
    "training_state": Target(_in_checkpoint(STATE), _of_checkpoint(STATE), mutate_headed),
    "training_tokens": Target(_in_checkpoint(TOKENS_TRAIN), _of_checkpoint(TOKENS_TRAIN), mutate_bytes),
}  # fmt: skip

"""What is in a checkpoint that training wrote."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from pastkey.contract import names
from pastkey.train import checkpoint as stored
from pastkey.train.data.token_files import DataInfo
from pastkey.train.model import Decoder
from pastkey.train.optimizer import make_optimizers, moments_of, restore_moments
from pastkey.train.resumed import read_training
from pastkey.train.settings import TrainConfig
from pastkey.train.tokenizer import train_bpe

from .mutations import mutate_bytes, mutate_headed, mutate_json
from .reader import Target, within, workplace
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
    for name in (stored.TOKENS_TRAIN, stored.TOKENS_VAL):
        (folder / name).write_bytes(ids.tobytes())
    info = DataInfo("c", "f", 1, "<u2", len(ids), len(ids), 10, tokenizer.begin, tokenizer.end)
    optimizers = make_optimizers(model, config)
    model(torch.tensor([[1, 2]]), torch.tensor([[0, 1]])).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
    moments = moments_of(optimizers, model)
    state = stored.TrainingState(3, moments, settings, info.to_json(), {"val_loss": 1.0})
    stored.save_checkpoint(folder, model, state)
    return folder


def _resume(folder: Path) -> object:
    checkpoint = stored.load_checkpoint(folder)
    resumed = read_training(checkpoint)
    restore_moments(make_optimizers(checkpoint.model, resumed.config), checkpoint.model, resumed.moments, 3)
    return resumed.step


CHECKPOINTS: Mapping[str, Target] = {
    "config": within(checkpoint_folder, names.CONFIG, _resume, mutate_json),
    "checkpoint_manifest": within(checkpoint_folder, names.MANIFEST, _resume, mutate_json),
    "checkpoint_weights": within(checkpoint_folder, names.WEIGHTS, _resume, mutate_headed),
    "training_state": within(checkpoint_folder, stored.STATE, _resume, mutate_headed),
    "training_tokens": within(checkpoint_folder, stored.TOKENS_TRAIN, _resume, mutate_bytes),
}

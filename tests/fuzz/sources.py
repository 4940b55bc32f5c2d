"""What is exported, as strangers publish it: weights, configurations, tokenizers; and checkpoints of our own."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import safetensors.torch
import torch

from pastkey.contract import names
from pastkey.export.source import pretrained, stored_weights
from pastkey.export.source.llama2c import open_llama2c
from pastkey.export.source.onnx_folder.folder import open_onnx
from pastkey.export.source.source import Opening
from pastkey.export.source.tokenizers.tokenizer import read_tokenizer
from pastkey.export.source.weights import load_weights
from pastkey.files.folder import read_json
from pastkey.train import checkpoint as stored
from pastkey.train.data.token_files import DataInfo
from pastkey.train.model import Decoder
from pastkey.train.optimizer import make_optimizers, moments_of, restore_moments
from pastkey.train.resumed import read_training
from pastkey.train.settings import TrainConfig
from pastkey.train.tokenizer import train_bpe

from ..export.source.onnx_folder.given_graphs import write_folder
from .mutations import mutate_bytes, mutate_headed, mutate_json
from .reader import Target, alone, json_bytes, within, workplace, written
from .samples import CORPUS, gguf_valid, llama2c_tokenizer, llama2c_valid, sentencepiece, word_tokenizer


def _weights(file: Path) -> object:
    return load_weights(torch.nn.Linear(3, 2), file, lambda text: None)


_SMALL: bytes = safetensors.torch.save({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})


def _huggingface(file: Path) -> object:
    folder, config = file.parent, read_json(file)
    (folder / names.WEIGHTS).write_bytes((checkpoint_folder() / names.WEIGHTS).read_bytes())
    pretrained.code_references(folder)
    stored_weights.check_weights(folder, config)
    stored_weights.check_sizes(folder, config)
    return config


def _index(file: Path) -> object:
    (file.parent / names.WEIGHTS).write_bytes(_SMALL)
    stored_weights.check_weights(file.parent, {})
    return file


@functools.cache
def _onnx_folder() -> Path:
    """As optimum writes it, with the weights next to the graph, so that most bytes of the graph mean something."""
    folder = write_folder(workplace() / "onnx")
    model = onnx.load(folder / "model.onnx")
    onnx.save_model(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=256
    )
    return folder


def _open_onnx(folder: Path) -> object:
    return open_onnx(folder / "model.onnx", Opening())


def _open_llama2c(file: Path, tokenizer: Path | None = None) -> object:
    return open_llama2c(file, Opening(tokenizer=tokenizer))


def _read_llama2c_tokenizer(file: Path) -> object:
    return _open_llama2c(written("model.bin", llama2c_valid()), file)


_CONFIG = {"hidden_size": 8, "vocab_size": 270, "num_hidden_layers": 1, "eos": None}
_WEIGHT_MAP = {"weight_map": dict.fromkeys(("weight", "bias"), names.WEIGHTS)}
_STOI = {"stoi": {"a": 0, "b": 1, "c": 2}, "itos": {"0": "a", "1": "b", "2": "c"}}

SOURCES: Mapping[str, Target] = {
    "safetensors": alone("weights.safetensors", _weights, _SMALL, mutate_headed),
    "huggingface_config": alone(f"huggingface/{names.CONFIG}", _huggingface, json_bytes(_CONFIG), mutate_json),
    "weight_map": alone(f"index/{names.WEIGHTS}.index.json", _index, json_bytes(_WEIGHT_MAP), mutate_json),
    "onnx_graph": within(_onnx_folder, "model.onnx", _open_onnx, mutate_bytes),
    "onnx_config": within(_onnx_folder, names.CONFIG, _open_onnx, mutate_json),
    "gguf": alone("m.gguf", stored_weights.check_gguf, gguf_valid(), mutate_bytes),
    "llama2c": alone("model.bin", _open_llama2c, llama2c_valid(), mutate_bytes),
    "llama2c_tokenizer": alone("tokenizer.bin", _read_llama2c_tokenizer, llama2c_tokenizer(), mutate_bytes),
    "sentencepiece": alone("spiece.model", read_tokenizer, sentencepiece(), mutate_bytes),
    "source_tokenizer": alone("source.json", read_tokenizer, word_tokenizer().to_str().encode(), mutate_json),
    "characters": alone("meta.json", read_tokenizer, json_bytes(_STOI), mutate_json),
}


# --- what is in a checkpoint that training wrote ----------------------------------------------------------------------
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

"""What is exported, as strangers publish it: weights, configurations, tokenizers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import onnx
import safetensors.torch
import torch

from pastkey.contract import names
from pastkey.export.source import pretrained, stored_weights
from pastkey.export.source.llama2c import open_llama2c
from pastkey.export.source.onnx_folder.folder import open_onnx
from pastkey.export.source.source import allowed
from pastkey.export.source.tokenizers.tokenizer import read_tokenizer
from pastkey.export.source.weights import load_weights
from pastkey.files.folder import read_json

from ..export.source.onnx_folder.given_graphs import write_folder
from .checkpoints import checkpoint_folder
from .mutations import mutate_bytes, mutate_headed, mutate_json
from .reader import Target, alone, json_bytes, within, workplace, written
from .samples import gguf_valid, llama2c_tokenizer, llama2c_valid, sentencepiece, word_tokenizer


def _weights(file: Path) -> object:
    return load_weights(torch.nn.Linear(3, 2), file, lambda text: None)


_SMALL: bytes = safetensors.torch.save({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})


def _huggingface(file: Path) -> object:
    folder, config = file.parent, read_json(file)
    (folder / names.WEIGHTS).write_bytes((checkpoint_folder() / names.WEIGHTS).read_bytes())
    pretrained._custom_code(folder, config)
    stored_weights.check_weights(folder, config)
    stored_weights.check_sizes(folder, config)
    return config


def _index(file: Path) -> object:
    (file.parent / names.WEIGHTS).write_bytes(_SMALL)
    stored_weights.check_weights(file.parent, {})
    return file


@functools.cache
def _onnx_folder() -> Path:
    """As optimum writes it, with the weights beside the graph, so that most bytes of the graph mean something."""
    folder = write_folder(workplace() / "onnx")
    model = onnx.load(folder / "model.onnx")
    onnx.save_model(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=256
    )
    return folder


def _open_onnx(folder: Path) -> object:
    return open_onnx(folder / "model.onnx", tokenizer=None, context_length=None, before_loading=allowed)


def _open_llama2c(file: Path, tokenizer: Path | None = None) -> object:
    return open_llama2c(file, tokenizer, None)


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

"""What is exported, as strangers publish it: weights, configurations, tokenizers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import torch

from pastkey.contract import names
from pastkey.export.source import pretrained, stored_weights
from pastkey.export.source.llama2c import open_llama2c
from pastkey.export.source.onnx_folder.folder import open_onnx
from pastkey.export.source.source import Opening
from pastkey.export.source.tokenizers.tokenizer import read_tokenizer
from pastkey.export.source.weights import load_weights
from pastkey.files.folder import read_json

from ..export.source.onnx_folder.given_graphs import write_folder
from .checkpoints import checkpoint_folder
from .mutations import mutate_bytes, mutate_headed, mutate_json
from .reader import Target, json_bytes, workplace, written
from .samples import gguf_valid, llama2c_tokenizer, llama2c_valid, sentencepiece, word_tokenizer


def _safetensors() -> bytes:
    return (checkpoint_folder() / names.WEIGHTS).read_bytes()


def _weights(content: bytes) -> object:
    module = torch.nn.Linear(3, 2)
    return load_weights(module, written("weights.safetensors", content), lambda text: None)


def _small_safetensors() -> bytes:
    import safetensors.torch

    content: bytes = safetensors.torch.save({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
    return content


def _huggingface(content: bytes) -> object:
    folder = workplace() / "huggingface"
    folder.mkdir(exist_ok=True)
    (folder / names.WEIGHTS).write_bytes(_safetensors())
    (folder / names.CONFIG).write_bytes(content)
    config = read_json(folder / names.CONFIG)
    pretrained._custom_code(folder, config)
    stored_weights.check_weights(folder, config)
    stored_weights.check_sizes(folder, config)
    return config


def _index(content: bytes) -> object:
    folder = workplace() / "index"
    folder.mkdir(exist_ok=True)
    (folder / names.WEIGHTS).write_bytes(_small_safetensors())
    (folder / f"{names.WEIGHTS}.index.json").write_bytes(content)
    stored_weights.check_weights(folder, {})
    return folder


@functools.cache
def _onnx_folder() -> Path:
    """As optimum writes it, with the weights beside the graph, so that most bytes of the graph mean something."""
    folder = write_folder(workplace() / "onnx")
    model = onnx.load(folder / "model.onnx")
    onnx.save_model(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=256
    )
    return folder


def _in_onnx_folder(file: str) -> Callable[[bytes], object]:
    def read(content: bytes) -> object:
        place = _onnx_folder() / file
        whole = place.read_bytes()
        place.write_bytes(content)
        graph = _onnx_folder() / "model.onnx"
        try:
            return open_onnx(graph, Opening())
        finally:
            place.write_bytes(whole)

    return read


def _read_llama2c_tokenizer(content: bytes) -> object:
    return open_llama2c(written("model.bin", llama2c_valid()), Opening(tokenizer=written("tokenizer.bin", content)))


def _as_tokenizer(name: str) -> Callable[[bytes], object]:
    return lambda content: read_tokenizer(written(name, content))


_STOI = {"stoi": {"a": 0, "b": 1, "c": 2}, "itos": {"0": "a", "1": "b", "2": "c"}}

SOURCES: Mapping[str, Target] = {
    "safetensors": Target(_weights, _small_safetensors, mutate_headed),
    "huggingface_config": Target(
        _huggingface,
        json_bytes({"hidden_size": 8, "vocab_size": 270, "num_hidden_layers": 1, "eos": None}),
        mutate_json,
    ),
    "weight_map": Target(
        _index, json_bytes({"weight_map": dict.fromkeys(("weight", "bias"), names.WEIGHTS)}), mutate_json
    ),
    "onnx_graph": Target(
        _in_onnx_folder("model.onnx"), lambda: (_onnx_folder() / "model.onnx").read_bytes(), mutate_bytes, native=True
    ),
    "onnx_config": Target(
        _in_onnx_folder(names.CONFIG), lambda: (_onnx_folder() / names.CONFIG).read_bytes(), mutate_json
    ),
    "gguf": Target(lambda content: stored_weights.check_gguf(written("m.gguf", content)), gguf_valid, mutate_bytes),
    "llama2c": Target(
        lambda content: open_llama2c(written("model.bin", content), Opening()), llama2c_valid, mutate_bytes
    ),
    "llama2c_tokenizer": Target(_read_llama2c_tokenizer, llama2c_tokenizer, mutate_bytes),
    "sentencepiece": Target(_as_tokenizer("spiece.model"), sentencepiece, mutate_bytes),
    "source_tokenizer": Target(
        _as_tokenizer("source.json"), lambda: word_tokenizer().to_str().encode(), mutate_json, native=True
    ),
    "characters": Target(_as_tokenizer("meta.json"), json_bytes(_STOI), mutate_json),
}  # fmt: skip

"""The bundles that the other programs load: each is made once, and their common sources are trained once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.environments import ROOT, smollm2
from pastkey.export import export
from pastkey.train.loop import train
from pastkey.train.settings import TrainConfig
from pastkey.train.tokenizer import END_OF_TEXT

from ..export.families import build
from ..export.graft.own import biases, blocks
from ..shared import shared
from ..short_exports import one_thread

# Short documents, so that the decoders learn to end; after name and number there is one continuation, so that few
# calls are close.
TEXT = END_OF_TEXT.join(
    f"{name} had {number} {colour} {things}. {name} said: “{word}!”"
    for _ in range(5)
    for number, colour, word in ((2, "red", "Oh"), (37, "blue", "Schön"))
    for name, things in (("Zoë", "cats"), ("Tom", "ships"), ("Anna", "hats"), ("Ben", "books"), ("Lily", "dogs"))
)


OWN = biases.DECODERS | blocks.DECODERS
Checkpoint = Callable[..., Path]  # (preset, **settings): `pastkey train` makes it of the sentences in seconds
PRESETS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},  # which is not hidden_size / heads
    "gpt2": {"kv_heads": 4},
    "llama of odd heads": {"preset": "llama", "head_dim": 10},  # the fused graph cannot have them
}


def source_of(name: str, trained: Checkpoint) -> tuple[Any, dict[str, Any]]:
    """The exported source: a preset, random weights, or others; and the options that it needs."""
    if name in PRESETS:
        return trained(**{"preset": name} | PRESETS[name]), {}
    if name in OWN:
        return OWN[name].make(), {"context_length": OWN[name].context}
    if name.endswith(".py"):
        return f"{ROOT / 'examples' / name}:make", {"context_length": 64}
    if name == "stories260K":  # a llama2.c checkpoint: SentencePiece's tokens, bytes where there is none
        folder = shared("models/stories260K")
        return folder / "stories260K.bin", {"tokenizer": folder / "tok512.bin"}
    if name == "smollm2":
        return smollm2(), {}
    pytest.importorskip("transformers", reason="transformers is not installed")
    return build(name.removeprefix("random ")), {"context_length": 64}


FP32: dict[str, Any] = {"precision": "fp32"}
STATIC, WEBGPU, QNN = {"graph": "static"}, {"target": "webgpu"}, {"target": "qnn"}
# name -> its source, and the options of its export. A line here is all that a further bundle needs.
BUNDLES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "llama-standard": ("llama of odd heads", {}),
    "gpt2": ("gpt2", {}),
    "stories260K": ("stories260K", {}),
    "smollm2": ("smollm2", {}),
    "llama-fp32": ("llama", FP32),
    "llama-fp16": ("llama", {"precision": "fp16"}),
    "llama-int4": ("llama", {"precision": "int4"}),
    "llama-portable": ("llama", {"target": "portable"}),
    "llama-static": ("llama", FP32 | STATIC),
}
# Those that only other hardware and plain onnxruntime load here.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "generate-fp32": ("llama", FP32 | {"generate": True}),
    "generate-int8": ("llama", {"generate": True}),
    "generate-standard-fp32": ("llama of odd heads", FP32 | {"generate": True}),
    "generate-gpt2-fp32": ("gpt2", FP32 | {"generate": True}),
    "llama-standard-fp32": ("llama of odd heads", FP32),
    "llama-webgpu": ("llama", FP32 | WEBGPU),
    "llama-webgpu-static": ("llama", FP32 | WEBGPU | STATIC),
    "llama-webgpu-int8": ("llama", WEBGPU),
    "gpt2-webgpu-fp16": ("gpt2", WEBGPU | {"precision": "fp16"}),
    "soft-cap-fp32": ("soft_cap", FP32),
    "soft-cap-webgpu-int8": ("soft_cap", WEBGPU),
    "short-conv": ("short_conv", FP32),  # which keeps rows in addition to keys and values
    "llama-qnn": ("llama", FP32 | QNN),
    "llama-qnn-int8": ("llama", QNN),
    "gpt2-qnn": ("gpt2", FP32 | QNN),
    "own-qnn": ("own_module.py", FP32 | QNN),
    "qwen2-qnn": ("random qwen2", FP32 | QNN),  # norms that multiply by their weight from the left
    "gemma2-qnn": ("random gemma2", FP32 | QNN),  # soft caps of scores with five axes
    "qwen3-qnn": ("random qwen3", FP32 | QNN),  # norms over four axes
}


@pytest.fixture(scope="session")
def trained(made_once):
    """trained(PRESET, **settings): the folder of a checkpoint."""
    small = {"steps": 150, "context": 64, "hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "vocab_size": 320}

    def checkpoint(preset: str, **settings: Any) -> Path:
        def make(folder: Path) -> None:
            (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
            given = small | {"threads": 1, "save_every": 150, "preset": preset} | settings
            with one_thread():
                train(TrainConfig.from_given(given), folder / "checkpoint", data=[folder / "corpus.txt"])

        name = "-".join([preset, *(f"{key}-{value}" for key, value in settings.items())])
        return made_once(f"trained-{name}", make) / "checkpoint"

    return checkpoint


@pytest.fixture(scope="session")
def bundles(made_once, trained):
    """bundles(NAME): the folder of a bundle of the table."""

    def bundle(name: str) -> Path:
        def make(folder: Path) -> None:
            source, options = (BUNDLES | MORE)[name]
            with one_thread():
                given, needed = source_of(source, trained)
                export(given, folder / "bundle", **needed | options)

        return made_once(f"bundle-{name}", make) / "bundle"

    return bundle


@pytest.fixture(scope="session", autouse=True)
def short(short_exports):
    """Exports of these tests are short."""

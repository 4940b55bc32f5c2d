"""The bundles that the other programs load: each is made once, and what several are made of is trained once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.environments import ROOT, smollm2
from pastkey.export import export
from pastkey.train.loop import train
from pastkey.train.settings import TrainConfig
from pastkey.train.tokenizer import END_OF_TEXT

from ..export.families import build
from ..export.graft.own.biases import DECODERS as BIASES
from ..export.graft.own.blocks import DECODERS as OWN
from ..shared import shared
from ..short_exports import one_thread

# Short documents, so that the decoders learn to end; after name and number there is one way to go on, so that few
# calls are close.
TEXT = END_OF_TEXT.join(
    f"{name} had {number} {colour} {things}. {name} said: “{word}!”"
    for _ in range(5)
    for number, colour, word in ((2, "red", "Oh"), (37, "blue", "Schön"))
    for name, things in (("Zoë", "cats"), ("Tom", "ships"), ("Anna", "hats"), ("Ben", "books"), ("Lily", "dogs"))
)


Checkpoint = Callable[..., Path]  # (preset, **settings): what `pastkey train` makes of the sentences in seconds
Write = Callable[[Path, Checkpoint], object]


def stories(out: Path, _: Checkpoint) -> None:
    """A llama2.c checkpoint: SentencePiece's tokens, bytes where there is none."""
    folder = shared("models/stories260K")
    export(folder / "stories260K.bin", out, tokenizer=folder / "tok512.bin")


# name -> what writes the bundle. A line here is all that a further bundle needs.
BUNDLES: dict[str, Write] = {
    "llama": lambda out, trained: export(trained("llama"), out),
    "qwen2": lambda out, trained: export(trained("qwen2"), out),
    "qwen3": lambda out, trained: export(trained("qwen3", head_dim=32), out),  # which is not hidden_size / heads
    "llama-standard": lambda out, trained: export(trained("llama", head_dim=10), out),  # the fused graph cannot have it
    "gpt2": lambda out, trained: export(trained("gpt2", kv_heads=4), out),
    "stories260K": stories,
    "smollm2": lambda out, _: export(smollm2(), out),
    "llama-fp32": lambda out, trained: export(trained("llama"), out, precision="fp32"),
    "llama-fp16": lambda out, trained: export(trained("llama"), out, precision="fp16"),
    "llama-int4": lambda out, trained: export(trained("llama"), out, precision="int4"),
    "llama-portable": lambda out, trained: export(trained("llama"), out, target="portable"),
    "llama-static": lambda out, trained: export(trained("llama"), out, precision="fp32", graph="static"),
}


def short_conv(out: Path, _: Checkpoint) -> None:
    """A decoder of random weights that keeps rows beside keys and values."""
    own = OWN["short_conv"]
    export(own.make(), out, precision="fp32", context_length=own.context)


def own_module(out: Path, _: Checkpoint) -> None:
    source = f"{ROOT / 'examples' / 'own_module.py'}:make"
    export(source, out, precision="fp32", target="qnn", context_length=64)


def own_rope(out: Path, _: Checkpoint) -> None:
    export(f"{ROOT / 'examples' / 'own_rope.py'}:make", out, precision="fp32", target="webgpu", context_length=128)


def soft_cap(out: Path, _: Checkpoint, **settings: Any) -> None:
    """A decoder of random weights whose scores of attention are capped."""
    own = BIASES["soft_cap"]
    export(own.make(), out, context_length=own.context, **settings)


def family(name: str, out: Path, _: Checkpoint) -> None:
    """A decoder of transformers, of random weights."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    export(build(name), out, precision="fp32", target="qnn", context_length=64)


def gpt2(out: Path, trained: Checkpoint, **settings: Any) -> None:
    export(trained("gpt2", kv_heads=4), out, **settings)


def llama(out: Path, trained: Checkpoint, **settings: Any) -> None:
    export(trained("llama"), out, **settings)


# Those that only other hardware and plain onnxruntime load here.
MORE: dict[str, Write] = {
    "generate-fp32": partial(llama, precision="fp32", generate=True),
    "generate-int8": partial(llama, generate=True),
    "generate-standard-fp32": lambda out, trained: export(
        trained("llama", head_dim=10), out, precision="fp32", generate=True
    ),
    "generate-gpt2-fp32": partial(gpt2, precision="fp32", generate=True),
    "llama-standard-fp32": lambda out, trained: export(trained("llama", head_dim=10), out, precision="fp32"),
    "llama-webgpu": partial(llama, precision="fp32", target="webgpu"),
    "llama-webgpu-static": partial(llama, precision="fp32", target="webgpu", graph="static"),
    "llama-webgpu-int8": partial(llama, target="webgpu"),
    "gpt2-webgpu-fp16": partial(gpt2, precision="fp16", target="webgpu"),
    "soft-cap-fp32": partial(soft_cap, precision="fp32"),
    "soft-cap-webgpu-int8": partial(soft_cap, target="webgpu"),
    "own-rope-webgpu": own_rope,
    "short-conv": short_conv,
    "llama-qnn": partial(llama, precision="fp32", target="qnn"),
    "llama-qnn-int8": partial(llama, target="qnn"),
    "gpt2-qnn": partial(gpt2, precision="fp32", target="qnn"),
    "own-qnn": own_module,
    "qwen2-qnn": partial(family, "qwen2"),  # norms that multiply by their weight from the left
    "gemma2-qnn": partial(family, "gemma2"),  # soft caps of scores with five axes
    "qwen3-qnn": partial(family, "qwen3"),  # norms over four axes
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
            with one_thread():
                (BUNDLES | MORE)[name](folder / "bundle", trained)

        return made_once(f"bundle-{name}", make) / "bundle"

    return bundle


@pytest.fixture(scope="session", autouse=True)
def short(short_exports):
    """Exports of these tests are short."""

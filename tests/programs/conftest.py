"""The bundles that the other programs load: each is made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.environments import ROOT, smollm2
from pastkey.export import export
from pastkey.train.loop import train
from pastkey.train.settings import TrainConfig
from pastkey.train.tokenizer import END_OF_TEXT

from ..export.graft.own.blocks import DECODERS as OWN
from ..shared import shared

# Short documents, so that the decoders learn to end; after name and number there is one way to go on, so that few
# calls are close.
TEXT = END_OF_TEXT.join(
    f"{name} had {number} {colour} {things}. {name} said: “{word}!”"
    for _ in range(5)
    for number, colour, word in ((2, "red", "Oh"), (37, "blue", "Schön"))
    for name, things in (("Zoë", "cats"), ("Tom", "ships"), ("Anna", "hats"), ("Ben", "books"), ("Lily", "dogs"))
)


def trained(
    out: Path,
    *,
    precision: str = "int8",
    target: str = "cpu",
    graph: str = "auto",
    generate: bool = False,
    **settings: Any,
) -> None:
    """A bundle of what `pastkey train` makes of a few sentences in seconds."""
    corpus = out.with_name("corpus.txt")
    corpus.write_text(TEXT, encoding="utf-8")
    small = {"steps": 150, "context": 64, "hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "vocab_size": 320}
    checkpoint = out.with_name("checkpoint")
    train(TrainConfig.from_given(small | {"threads": 1, "save_every": 150} | settings), checkpoint, data=[corpus])
    export(checkpoint, out, precision=precision, target=target, graph=graph, generate=generate)


def stories(out: Path) -> None:
    """A llama2.c checkpoint: SentencePiece's tokens, bytes where there is none."""
    folder = shared("models/stories260K")
    export(folder / "stories260K.bin", out, tokenizer=folder / "tok512.bin")


# name -> what writes the bundle. A line here is all that a further bundle needs.
BUNDLES: dict[str, Callable[[Path], object]] = {
    "llama": lambda out: trained(out, preset="llama"),
    "qwen2": lambda out: trained(out, preset="qwen2"),
    "qwen3": lambda out: trained(out, preset="qwen3", head_dim=32),  # which is not hidden_size / heads
    "llama-standard": lambda out: trained(out, preset="llama", head_dim=10),  # which the fused graph cannot have
    "gpt2": lambda out: trained(out, preset="gpt2", kv_heads=4),
    "stories260K": stories,
    "smollm2": lambda out: export(smollm2(), out),
    "llama-fp32": lambda out: trained(out, preset="llama", precision="fp32"),
}


def short_conv(out: Path) -> None:
    """A decoder of random weights that keeps rows beside keys and values."""
    own = OWN["short_conv"]
    export(own.make(), out, precision="fp32", context_length=own.context)


# Those that only other hardware and plain onnxruntime load here.
MORE: dict[str, Callable[[Path], object]] = {
    "generate-fp32": lambda out: trained(out, preset="llama", precision="fp32", generate=True),
    "generate-int8": lambda out: trained(out, preset="llama", generate=True),
    "generate-standard-fp32": lambda out: trained(out, preset="llama", head_dim=10, precision="fp32", generate=True),
    "generate-gpt2-fp32": lambda out: trained(out, preset="gpt2", kv_heads=4, precision="fp32", generate=True),
    "llama-standard-fp32": lambda out: trained(out, preset="llama", head_dim=10, precision="fp32"),
    "llama-webgpu": lambda out: trained(out, preset="llama", precision="fp32", target="webgpu"),
    "llama-webgpu-static": lambda out: trained(out, preset="llama", precision="fp32", target="webgpu", graph="static"),
    "llama-webgpu-int8": lambda out: trained(out, preset="llama", target="webgpu"),
    "gpt2-webgpu-fp16": lambda out: trained(out, preset="gpt2", kv_heads=4, precision="fp16", target="webgpu"),
    "short-conv": short_conv,
    "llama-qnn": lambda out: trained(out, preset="llama", precision="fp32", target="qnn"),
    "llama-qnn-int8": lambda out: trained(out, preset="llama", target="qnn"),
    "gpt2-qnn": lambda out: trained(out, preset="gpt2", kv_heads=4, precision="fp32", target="qnn"),
    "own-qnn": lambda out: export(
        f"{ROOT / 'examples' / 'own_module.py'}:make", out, precision="fp32", target="qnn", context_length=64
    ),
}


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """bundles(NAME): the folder of a bundle of the table."""
    made: dict[str, Path] = {}

    def bundle(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp(name) / "bundle"
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as the other tests of export do: decoders this small are slower on several
            try:
                (BUNDLES | MORE)[name](out)
            finally:
                torch.set_num_threads(threads)
            made[name] = out
        return made[name]

    return bundle

"""Decoders that others trained, whose answers are known without us: a document, a task, another program's numbers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pastkey.export import export
from pastkey.export.measure.metrics import kl_divergence
from pastkey.runtime import load

from .shared import shared

Run = Callable[..., "subprocess.CompletedProcess[str]"]
PRECISIONS = ("fp32", "int8")
CLOSE = 0.1  # logits: what int8 may confuse


def margin_where_they_part(told: list[int], found: list[int], logits: npt.NDArray[np.float32]) -> float:
    """By how much the first token that `found` has not in common was the likeliest; `logits` (T, V) chose `told`."""
    step = next((i for i, (a, b) in enumerate(zip(told, found, strict=True)) if a != b), None)
    if step is None:
        return 0.0
    best, second = np.sort(logits[step])[-1:-3:-1]
    return float(best - second)


# --- stories260K, a llama2.c checkpoint ---------------------------------------------------------------------------
# What `./run stories260K.bin -z tok512.bin -t 0.0` prints, by doc/stories260K.md of llama2.c: 256 tokens.
STORY = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, \
red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play with \
your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she said, "I'm sorry, mom. I didn't know what to do." Her mom said, "Don't worry, \
Lily. We can help you."""


@pytest.fixture(scope="module")
def stories(pastkey_command, tmp_path_factory):
    """A folder with the bundles fp32/ and int8/, made by the command."""
    folder, out = shared("models/stories260K"), tmp_path_factory.mktemp("stories")
    for precision in PRECISIONS:
        given = (folder / "stories260K.bin", "--tokenizer", folder / "tok512.bin", "--precision", precision)
        done = pastkey_command("export", *given, "--out", out / precision)
        assert done.returncode == 0, done.stderr
    return out


@pytest.mark.matrix  # a public clone has no ../shared
def test_stories260k_tells_its_documented_story(stories, pastkey_command):
    done = pastkey_command("run", stories / "fp32", "--prompt", "", "--max-new-tokens", "256", "--json")
    assert json.loads(done.stdout)["text"] == STORY
    done = pastkey_command("run", stories / "fp32", "--prompt", "", "--max-new-tokens", "256")
    assert done.stdout == STORY + "\n"


@pytest.mark.matrix  # a public clone has no ../shared
def test_stories260k_ends_its_story_with_the_token_that_begins_the_next(stories):
    told = load(stories / "fp32").generate("", max_new_tokens=500)
    assert told.finish_reason == "stop"
    assert told.text.startswith(STORY)


@pytest.mark.matrix  # a public clone has no ../shared
def test_int8_of_stories260k_leaves_the_story_only_where_two_tokens_are_as_likely(stories):
    exact = load(stories / "fp32")
    told = exact.generate("", max_new_tokens=256).ids
    quantized = load(stories / "int8")
    found = quantized.generate("", max_new_tokens=256).ids
    logits = exact.logits([1, *told])
    assert found[:32] == told[:32]
    # Three times the root mean square of int8's error here. How the rounding falls depends on the last bits of what
    # calibration sees, and so on the number of threads.
    assert margin_where_they_part(told, found, logits) < 0.25
    assert kl_divergence(logits, quantized.logits([1, *told])) < 1e-3


# --- glassllm, a Llama of odd sizes whose own program is numpy ----------------------------------------------------
class GlassBlock(nn.Module):
    """Projections named as glassllm names them; rotary pairs are adjacent."""

    def __init__(self, width: int, inner: int, heads: int, kv_heads: int, eps: float) -> None:
        super().__init__()
        self.size = width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.W_Q, self.W_O = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.W_K, self.W_V = (nn.Linear(width, kv_heads * self.size, bias=False) for _ in range(2))
        self.W1, self.W3 = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.W2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = self.norm1(x)
        query, key, value = (
            project(normed).unflatten(2, (-1, self.size)).transpose(1, 2) for project in (self.W_Q, self.W_K, self.W_V)
        )
        query, key = self.turned(query, cos, sin), self.turned(key, cos, sin)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.W_O(mixed.transpose(1, 2).flatten(2))
        normed = self.norm2(x)
        return x + self.W2(F.silu(self.W1(normed)) * self.W3(normed))

    @staticmethod
    def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = heads[..., 0::2], heads[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(3)


class Glass(nn.Module):
    def __init__(self, original: Any) -> None:
        super().__init__()
        cfg, weights = original.cfg, {name: p.data for name, p in original.named_parameters().items()}
        inner = weights["blocks.0.ffn.W1"].shape[1]
        self.E = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList(
            GlassBlock(cfg.d_model, inner, cfg.n_heads, cfg.n_kv_heads, cfg.eps) for _ in range(cfg.n_layers)
        )
        self.norm_f = nn.RMSNorm(cfg.d_model, cfg.eps)
        size = cfg.d_model // cfg.n_heads
        self.register_buffer("speeds", cfg.rope_base ** (-torch.arange(0, size, 2) / size))
        shorter = {name.replace("attn.", "").replace("ffn.", ""): value for name, value in weights.items()}
        state = {name.replace("gamma", "").rstrip(".") + ".weight": value for name, value in shorter.items()}
        state = {name: value.T if ".W" in name else value for name, value in state.items()}
        self.load_state_dict({name: torch.tensor(value) for name, value in state.items()} | {"speeds": self.speeds})

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        angles = position_ids[:, None, :, None] * self.speeds  # (B, 1, T, D/2)
        hidden = self.E(input_ids)
        for block in self.blocks:
            hidden = block(hidden, angles.cos(), angles.sin())
        return F.linear(self.norm_f(hidden), self.E.weight)


TEXT = "It was a bright morning, and the old man said to the boy that"


@pytest.fixture(scope="module")
def glass():
    """glassllm's English model, and the ids of a text."""
    glassllm = pytest.importorskip("glassllm", reason="glassllm, of the group dev, is not installed")
    model, tokenizer = glassllm.load_pretrained("en")
    return model, tokenizer.encode(TEXT)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_bundle_agrees_with_glassllms_own_numpy(precision, glass, tmp_path):
    original, prompt = glass
    module = Glass(original)
    assert module.blocks[0].W1.out_features == 341
    export(module, tmp_path / "bundle", precision=precision, context_length=original.cfg.max_len)
    told = [step.token for step in original.generate(prompt, 100, greedy=True)]
    expected = original.forward([*prompt, *told]).data[0]
    lm = load(tmp_path / "bundle")
    found, error = lm.generate(prompt, max_new_tokens=100).ids, lm.logits([*prompt, *told]) - expected
    largest = np.abs(error).max() / np.abs(expected).max()
    if precision == "fp32":
        assert largest < 1e-5
        assert found == told
    else:
        assert largest < 0.02
        assert margin_where_they_part(told, found, expected[len(prompt) - 1 :]) < CLOSE

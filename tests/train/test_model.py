"""What every decoder of every variant must do, and that transformers computes the same."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pastkey.contract.config import ModelConfig, RopeScaling
from pastkey.train.checkpoint import save_checkpoint
from pastkey.train.model import Decoder, Sinusoids, generate, positions_like
from pastkey.train.pretrained import checkpoint_activations

from .helpers import bare_checkpoint, no_state

BASE: dict[str, Any] = {
    "vocab_size": 101, "max_position_embeddings": 40, "hidden_size": 48, "intermediate_size": 72,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "eos_token_id": 7,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "untied": {"tie_word_embeddings": False, "num_key_value_heads": 4, "rope_theta": 500.0},
    "gpt2": {"position_encoding": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True, "qkv_bias": True},
    "classic": {
        "position_encoding": "sinusoidal", "norm": "none", "mlp": "none", "intermediate_size": 0,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": False,
    },
    "odd": {"hidden_size": 9, "position_encoding": "sinusoidal", "head_dim": 3, "max_position_embeddings": 8},
}  # fmt: skip


# In addition to the kinds: YaRN with every optional key, and with pairs that all turn too seldom.
SCALINGS = {
    "linear": RopeScaling("linear", 3.0),
    "dynamic": RopeScaling("dynamic", 2.0),
    "yarn": RopeScaling("yarn", 4.0, 10),
    "yarn in full": RopeScaling("yarn", 2.5, 16, attention_factor=1.3, beta_fast=4.0, beta_slow=0.5),
    "llama3": RopeScaling("llama3", 8.0, 16),
    "llama3 in full": RopeScaling("llama3", 4.0, 20, low_freq_factor=0.5, high_freq_factor=2.0),
}


def decoder(variant: str, **changes: Any) -> Decoder:
    """A decoder with weights large enough that a mistake shows."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**(BASE | VARIANTS[variant] | changes))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_ids(rows: int, length: int) -> Tensor:
    return torch.randint(0, BASE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_have_one_row_per_position_and_look_only_back(variant):
    model, ids = decoder(variant), random_ids(3, 7)
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 101
    logits, after = (model(given, positions_like(ids)) for given in (ids, changed))
    assert logits.shape == (3, 7, 101)
    assert torch.allclose(logits[:, :5], after[:, :5], atol=1e-5)
    assert not torch.allclose(logits[:, 5:], after[:, 5:], atol=1e-2)


def test_sinusoids_are_those_of_the_paper():
    encoding = Sinusoids(5)(torch.tensor([[0, 3]]))[0]
    assert encoding[0].tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]
    expected = [math.sin(3), math.cos(3), math.sin(3 / 10000 ** (2 / 5))]
    assert encoding[1][:3].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3", "untied"])
def test_transformers_loads_the_checkpoint_and_computes_the_same(variant, tmp_path):
    assert_transformers_computes_the_same(decoder(variant), tmp_path, [17])


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_rotary_positions_are_those_of_transformers(name, tmp_path):
    """In a text within the original context, and in one as long as the scaled context."""
    model = decoder("llama", rope_scaling=SCALINGS[name])
    assert_transformers_computes_the_same(model, tmp_path, [9, 40])
    ids = random_ids(1, 40)
    plain, scaled = (one(ids, positions_like(ids)) for one in (decoder("llama"), model))
    assert torch.allclose(scaled, plain, atol=1e-2) == (name == "dynamic")


def assert_transformers_computes_the_same(model: Decoder, folder: Path, lengths: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns of its own deprecations
        transformers = pytest.importorskip("transformers")
        save_checkpoint(bare_checkpoint(folder), model, no_state())
        loaded, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for length in lengths:
        ids = random_ids(3, length)
        with torch.no_grad():
            ours, theirs = model(ids, positions_like(ids)), loaded(ids).logits
        assert torch.allclose(ours, theirs, atol=1e-4), (ours - theirs).abs().max()


def test_generate_takes_the_likeliest_token_until_the_end_token():
    model, prompt = decoder("llama"), random_ids(3, 4)
    for row, start in zip(generate(model, prompt, 12), prompt.tolist(), strict=True):
        ids = torch.tensor([start + row])
        logits = model(ids, positions_like(ids))[0]
        assert row == logits[3 : 3 + len(row)].argmax(dim=-1).tolist()
        assert len(row) == 12 or logits[3 + len(row)].argmax() == 7
        assert 7 not in row


def test_generate_stops_at_the_context_and_repeats_under_a_seed():
    model, prompt = decoder("odd", eos_token_id=None), random_ids(2, 3)
    assert [len(row) for row in generate(model, prompt, 50, temperature=1.0, seed=4)] == [5, 5]
    first, again, other = (generate(model, prompt, 5, temperature=1.0, seed=seed) for seed in (4, 4, 5))
    assert first == again != other


def test_gradient_checkpointing_keeps_one_activation_of_a_layer():
    model, ids = decoder("llama", num_hidden_layers=6), torch.arange(40)[None] % 101
    kept, gradients = [], []
    for change in (lambda model: None, checkpoint_activations):
        change(model)
        size = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal size
            size += tensor.numel() * (not isinstance(tensor, torch.nn.Parameter))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(ids, positions_like(ids)).square().mean()
        (gradient,) = torch.autograd.grad(loss, model.model.embed_tokens.weight)
        kept.append(size)
        gradients.append(gradient)
    assert torch.equal(*gradients)
    assert kept[1] < kept[0] / 5

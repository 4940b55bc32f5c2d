"""Presets, the sizes that follow from one another, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pastkey.contract.config import RopeScaling
from pastkey.errors import InputError
from pastkey.train.settings import PRESETS, TrainConfig


@pytest.mark.parametrize(
    ("preset", "model_type"),
    [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("gpt2", "pastkey"), ("classic", "pastkey")],
)
def test_presets_are_the_architectures_they_are_named_after(preset, model_type):
    model, sizes = TrainConfig.from_given({"preset": preset}).model_config(99, None, 0), PRESETS[preset].model
    assert (model.model_type, model.vocab_size) == (model_type, 99)
    for name in ("head_dim", "max_position_embeddings"):
        assert getattr(model, name) == sizes[name]


LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 8, "original_context": 32}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"hidden_size": 40, "heads": 5}, {"num_key_value_heads": 5, "head_dim": 8}),
        ({"heads": 3, "head_dim": 10}, {"num_key_value_heads": 3, "head_dim": 10}),
        ({"heads": 8}, {"num_key_value_heads": 2, "head_dim": 16}),
        ({"heads": 2, "kv_heads": 1}, {"num_key_value_heads": 1, "head_dim": 64}),
        ({"context": 8, "layers": 1}, {"max_position_embeddings": 8, "num_hidden_layers": 1}),
        ({"hidden_size": 6, "heads": 3}, {"intermediate_size": 12, "head_dim": 2}),
        ({"rope_scaling": "linear", "rope_factor": 2}, {"rope_scaling": RopeScaling("linear", 2)}),
        ({"rope_scaling": "yarn", "rope_factor": 4.0}, {"rope_scaling": RopeScaling("yarn", 4.0, 48)}),
        (LLAMA3, {"rope_scaling": RopeScaling("llama3", 8, 32)}),
    ],
)
def test_sizes_that_are_not_given_follow_those_that_are(given, expected):
    model = TrainConfig.from_given(given).model_config(99, None, 0)
    assert {name: getattr(model, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"preset": "gpt5"}, "no preset 'gpt5'; the presets are classic"),
        ({"steps": 0}, "--steps is 0"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"optimizer": "sgd"}, "--optimizer is 'sgd'; it must be one of muon, adamw"),
        ({"init": "m", "optimizer": "muon"}, "--optimizer is 'muon'; it must be adamw"),
        ({"steps": 5, "minutes": 1.0}, "--minutes plans the steps: give it or --steps"),
        ({"minutes": 0}, "--minutes is 0; it must be a number above 0"),
        ({"weight_decay": -0.1}, "--weight-decay is -0.1"),
        ({"rope_scaling": "ntk", "rope_factor": 2.0}, "--rope-scaling is 'ntk'; it must be one of linear, dynamic"),
        ({"rope_scaling": "yarn", "rope_factor": 0.5}, "--rope-factor is 0.5; it must be a number from 1"),
        ({"rope_factor": 2.0}, "--rope-scaling and --rope-factor are given together"),
        ({"original_context": 64}, "--original-context is read by --rope-scaling yarn and llama3"),
        ({"preset": "gpt2", "rope_scaling": "linear", "rope_factor": 2.0}, "those of the preset gpt2 are learned"),
    ],
)
def test_nonsense_is_refused(given, sentence):
    with pytest.raises(InputError, match=sentence):
        TrainConfig.from_given(given)


def test_the_settings_load_without_torch():
    code = "import sys, pastkey.train, pastkey.train.cli, pastkey.train.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

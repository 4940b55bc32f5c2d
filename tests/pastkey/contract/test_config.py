from __future__ import annotations

import json

import pytest

from pastkey.contract.config import ModelConfig, RopeScaling
from pastkey.errors import InputError


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "llama"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        ({"rope_scaling": RopeScaling("linear", 2)}, "llama"),
        ({"rope_scaling": RopeScaling("yarn", 4.0, 64, attention_factor=1.5, beta_fast=16.0)}, "llama"),
        ({"rope_scaling": RopeScaling("llama3", 8.0, 64, low_freq_factor=0.5)}, "llama"),
        ({"position_encoding": "learned"}, "pastkey"),
        ({"mlp": "none", "intermediate_size": 0}, "pastkey"),
    ],
)
def test_what_is_written_is_read_again(fields, kind):
    config = ModelConfig(vocab_size=300, **fields)
    written = json.loads(json.dumps(config.to_json()))
    assert written["model_type"] == config.model_type == kind
    assert ModelConfig.from_json(written) == config


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; it must be a whole number from 1"),
        ({"head_dim": True}, "head_dim is True; it must be a whole number from 1"),
        ({"num_key_value_heads": 4}, "it must be a divisor of num_attention_heads"),
        (
            {"rope_scaling": RopeScaling("linear", 2), "position_encoding": "learned"},
            "rope_scaling .* must be left out: the positions are learned",
        ),
        ({"norm": "batchnorm"}, "norm is 'batchnorm'; it must be rmsnorm, layernorm or none"),
    ],
)
def test_a_field_out_of_range_is_named(fields, sentence):
    with pytest.raises(InputError, match=sentence):
        ModelConfig(**({"vocab_size": 300} | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**30},
        {"num_hidden_layers": 1001},
        {"vocab_size": 2**31},
        {"rope_theta": "x"},
        {"rope_theta": 1e400},
        {"norm_eps": [1]},
        {"tie_word_embeddings": 1},
        {"norm": ["rmsnorm"]},
        {"bos_token_id": 1.5},
    ],
)
def test_a_field_of_another_type_or_beyond_any_model_is_named(fields):
    (name,) = fields
    with pytest.raises(InputError, match=name):
        ModelConfig.from_json(ModelConfig(vocab_size=300).to_json() | fields)


@pytest.mark.parametrize(
    ("scaling", "sentence"),
    [
        ({"rope_type": "longrope", "factor": 2}, "rope_type is 'longrope'; it must be linear, dynamic, yarn, llama3"),
        ({"rope_type": "linear", "factor": 0.5}, "factor is 0.5; it must be a number from 1"),
        ({"rope_type": "linear"}, "rope_scaling has no 'factor'"),
        ({"rope_type": "linear", "factor": 2, "mscale": 1}, "rope_scaling has an unknown key 'mscale'"),
        ({"rope_type": "linear", "factor": 2, "beta_fast": 3}, "beta_fast is 3; it must be left out with linear"),
        ({"rope_type": "yarn", "factor": 2}, "original_max_position_embeddings is None; it must be a whole number"),
        (
            {"rope_type": "llama3", "factor": 2, "original_max_position_embeddings": 8, "low_freq_factor": 4},
            r"high_freq_factor is 4\.0; it must be a number above low_freq_factor \(4\)",
        ),
    ],
)
def test_a_rope_scaling_that_cannot_be_computed_is_named(scaling, sentence):
    with pytest.raises(InputError, match=sentence):
        ModelConfig.from_json(ModelConfig(vocab_size=300).to_json() | {"rope_scaling": scaling})


def test_a_key_that_is_missing_or_unknown_is_named():
    written = ModelConfig(vocab_size=300).to_json()
    with pytest.raises(InputError, match=r"config\.json has no 'vocab_size'"):
        ModelConfig.from_json({key: value for key, value in written.items() if key != "vocab_size"})
    with pytest.raises(InputError, match=r"config\.json has the key 'experts'"):
        ModelConfig.from_json(written | {"experts": 8})

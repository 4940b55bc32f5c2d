"""None"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pastkey.contract.config import ModelConfig, RopeScaling
from pastkey.contract.source_files import source_files
from pastkey.errors import InputError

from ...wrong_values import without, wrong_fields

WRITTEN = ModelConfig(vocab_size=300).to_json()


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "llama"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        ({"qk_norm": True, "qkv_bias": True}, "pastkey"),
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


def test_a_field_that_is_missing_or_of_another_type_or_out_of_range_is_named():
    for name, value in [*wrong_fields(ModelConfig), ("num_hidden_layers", 10**30), ("experts", 8)]:
        with pytest.raises(InputError, match=name if name != "rope_scaling" else "rope|factor|beta|original"):
            ModelConfig.from_json(without(WRITTEN, name, value))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4; .* a divisor of"),
        ({"rope_scaling": RopeScaling("linear", 2), "position_encoding": "learned"}, "rope_scaling .* be left out"),
        ({"mlp": "none"}, "intermediate_size"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"head_dim": 3}, "head_dim is 3; .* an even number"),
        ({"eos_token_id": 300}, "eos_token_id"),
    ],
)
def test_fields_that_do_not_agree_are_named(fields, name):
    with pytest.raises(InputError, match=name):
        ModelConfig(**({"vocab_size": 300} | fields))


@pytest.mark.parametrize(
    ("scaling", "name"),
    [
        ({"mscale": 1}, "unknown key 'mscale'"),
        ({"beta_fast": 3}, "beta_fast is 3; it must be left out with linear"),
        ({"rope_type": "yarn"}, "original_max_position_embeddings is None; it must be a whole number"),
        ({"rope_type": "yarn", "original_max_position_embeddings": 8, "beta_slow": 32}, "beta_fast is 32.0"),
        (
            {"rope_type": "llama3", "original_max_position_embeddings": 8, "low_freq_factor": 4},
            r"high_freq_factor is 4\.0; it must be a number above low_freq_factor \(4\)",
        ),
    ],
)
def test_a_rope_scaling_that_cannot_be_computed_is_named(scaling, name):
    with pytest.raises(InputError, match=name):
        ModelConfig.from_json(WRITTEN | {"rope_scaling": {"rope_type": "linear", "factor": 2, **scaling}})


# --- the fields that an export reads of a folder or a file, and others ---------------------------------------------
def test_a_folder_has_its_own_files_and_those_of_its_graphs_and_a_file_its_neighbours(tmp_path):
    graph, plain = {"model.onnx", "model.onnx_data"}, {"config.json", "merges.txt"}
    others = "a.gguf b[1].gguf nohup.out log.txt .config.json onnx/model.onnx runs/a.json"
    for name in (*others.split(), *graph, *plain):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert set(source_files(tmp_path)) == {*plain, *graph, str(Path("onnx", "model.onnx"))}
    assert set(source_files(tmp_path / "b[1].gguf")) == {"config.json", "b[1].gguf"}
    assert set(source_files(tmp_path / "model.onnx")) == {"config.json", *graph}
    assert source_files(tmp_path)["config.json"] == tmp_path / "config.json"


def test_an_adapter_has_the_files_of_its_base(tmp_path):
    base, config = tmp_path / "base" / "config.json", tmp_path / "adapter" / "adapter_config.json"
    for file, of in ((base, {}), (config, {"base_model_name_or_path": str(base.parent)})):
        file.parent.mkdir()
        file.write_text(json.dumps(of))
    assert source_files(config.parent) == {"adapter_config.json": config, "base config.json": base}
    config.write_text(json.dumps({"base_model_name_or_path": str(config.parent)}))  # of itself
    assert source_files(config.parent) == {"adapter_config.json": config}

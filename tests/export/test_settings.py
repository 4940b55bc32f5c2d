"""The settings of an export, and the keys by which it and the state of its source are told from others."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import re
from typing import Any, get_type_hints

import numpy as np
import pytest

import pastkey
from pastkey.contract import names
from pastkey.errors import InputError, IntegrityError
from pastkey.export import export, pipeline
from pastkey.export.cli import export_command
from pastkey.export.keys import Keys, identity, keys_of, require_unchanged
from pastkey.export.progress import Progress
from pastkey.export.settings import ExportConfig, ExportOptions
from pastkey.export.source import pretrained


def test_python_and_the_command_line_have_the_same_settings_and_defaults():
    parser = argparse.ArgumentParser()
    export_command.add_arguments(parser)
    told = vars(parser.parse_args(["source", "--out", "bundle"]))
    fields = dataclasses.fields(ExportConfig)
    for field in fields:
        assert told[field.name] == field.default
    assert set(told) == {field.name for field in fields} | {"source", "out", "json"}
    options = get_type_hints(ExportOptions)
    assert options | {"precision": str | None} == get_type_hints(ExportConfig)
    documented = re.findall(r"^ +- `(\w+)`", str(ExportOptions.__doc__), re.MULTILINE)
    assert documented == list(options)
    assert inspect.signature(export).parameters["precision"].default == ExportConfig.precision


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"precision": "int3"}, "precision is 'int3'; it must be one of"),
        ({"graph": "static"}, "--precision int8 and a static graph exclude"),
        ({"target": "coreml", "precision": "int8"}, "static graphs are made in float32, for qnn also in int8"),
        ({"target": "qnn", "graph": "standard"}, "--target qnn and --graph standard exclude"),
        ({"target": "qnn", "max_kl": 0.1}, "they are for pastkey's own int8"),
        ({"chunk": 64}, "--chunk and --graph auto exclude"),
        ({"target": "qnn", "precision": "fp32", "chunk": 0}, "chunk is 0; it must be"),
        ({"target": "portable", "precision": "fp32", "graph": "fused"}, "--graph fused and --target portable exclude"),
        ({"format": "gguf"}, "format is 'gguf'; it must be one of"),
        ({"format": "ort", "target": "cuda"}, "--format ort and --target cuda exclude"),
        ({"max_kl": float("nan")}, "max_kl is nan; it must be"),
        ({"precision": "fp32", "max_kl": 0.1}, "and --precision fp32 exclude"),
        ({"precision": "fp32", "calibration": "text"}, "it rounds no matrix to integers"),
        ({"precision": "fp32", "sensitivity": "table.json"}, "--calibration, --max-kl or --sensitivity and"),
        ({"graph": "static", "precision": "fp32", "format": "ort"}, "it is for graphs whose sizes change"),
        ({"provider_options": {"a": "b"}}, "--provider-option or --allow-fallback and --target cpu exclude"),
        ({"quick": True, "max_kl": 0.1}, "it measures no single matrix"),
        ({"shard_size": "2 apples"}, "shard_size is '2 apples'; it must be"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_said(settings, words):
    with pytest.raises(InputError, match=words):
        ExportConfig(**settings)


def test_a_target_of_fixed_sizes_gets_the_static_graph_of_the_common_one():
    for target, graph in (("qnn", "auto"), ("coreml", "auto"), ("cpu", "static")):
        config = ExportConfig(precision="fp32", chunk=8, target=target, graph=graph)
        assert config.static
        assert config.common == ExportConfig(precision="fp32", graph="standard", target="cpu")
    assert not ExportConfig().static
    assert ExportConfig().common == ExportConfig()


SOURCE = {"a": 1}
ALL = {"graph", "text", "matrices"}


# --- keys ---------------------------------------------------------------------------------------------------------
def same(one: Keys, other: Keys) -> set[str]:
    """The steps with one key in both."""
    first, second = dataclasses.asdict(one), dataclasses.asdict(other)
    return {step for step, key in first.items() if key is not None and key == second[step]}


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"force": True, "generate": True, "max_kl": 0.1, "shard_size": "2GB", "sensitivity": "table.json"}, ALL),
        ({"precision": "int4"}, {"graph"}),
        ({"precision": "fp32"}, {"graph"}),
        ({"calibration": "other"}, {"graph"}),
        ({"target": "webgpu", "eos": 3, "chat_template": "other.jinja"}, {"graph"}),
        ({"quick": True}, set()),
        ({"context_length": 16}, set()),
        ({"cache": False}, set()),
    ],
)
def test_a_step_is_of_one_source_and_the_options_that_it_depends_on(options, found):
    first, config = keys_of(ExportConfig(), SOURCE, "fused"), ExportConfig(**options)
    assert same(first, keys_of(config, SOURCE, "fused")) == found
    assert same(first, keys_of(config, {"a": 2}, "fused")) == set()
    assert same(first, keys_of(config, None, "fused")) == set()
    assert "graph" not in same(first, keys_of(config, SOURCE, "standard"))


@pytest.mark.parametrize("room", ["pastkey", "runtime", "train"])
def test_a_step_is_of_the_code_that_makes_and_proves_it(room, tmp_path, monkeypatch):
    before = keys_of(ExportConfig(), SOURCE, "fused")
    (tmp_path / "changed.py").write_text("")
    monkeypatch.setattr(getattr(pastkey, room, pastkey), "__file__", str(tmp_path / "__init__.py"))
    assert same(before, keys_of(ExportConfig(), SOURCE, "fused")) == set()


def test_a_step_is_of_the_cpu_whose_kernels_made_it(monkeypatch):
    before = keys_of(ExportConfig(), SOURCE, "fused")
    for extensions in ({"found": ["AVX2"]}, {}):  # numpy leaves out what is empty, as on ARM
        monkeypatch.setattr(np, "show_config", lambda mode, found=extensions: {"SIMD Extensions": found})
        assert same(before, keys_of(ExportConfig(), SOURCE, "fused")) == set()


@pytest.mark.parametrize(
    ("file", "content", "kept"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "own.Own"}}, True),
        ("config.json", {"auto_map": {"AutoConfig": "org/name--own.Own"}}, False),
        ("adapter_config.json", {"base_model_name_or_path": "org/name"}, False),
    ],
)
def test_a_source_with_parts_on_the_hub_has_no_keys(file, content, kept, tmp_path):
    config = ExportConfig(trust_remote_code=True)
    (tmp_path / file).write_text(json.dumps(content))
    assert (keys_of(config, identity(tmp_path, config), "fused") != Keys()) == kept


# --- a source that changes ----------------------------------------------------------------------------------------
def test_a_source_that_changes_under_an_export_is_refused(tmp_path):
    source, config = tmp_path / "model", ExportConfig()
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "model.safetensors").write_bytes(bytes(3 << 20))
    before = identity(source, config)
    require_unchanged(source, config, before)
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(IntegrityError, match=r"model changed while it was exported \(model\.safetensors\): export it"):
        require_unchanged(source, config, before)
    # A checkpoint was read as a whole, and training continues.
    (source / names.MANIFEST).write_text(json.dumps({}))
    require_unchanged(source, config, before)


def test_a_source_that_changes_while_its_weights_are_read_is_refused(llama_folder, tmp_path, monkeypatch):
    original = pretrained._load

    def load(*args: Any, **options: Any) -> Any:
        loaded = original(*args, **options)
        os.utime(llama_folder / "model.safetensors", ns=(1, 1))
        return loaded

    monkeypatch.setattr(pretrained, "_load", load)
    config = ExportConfig()
    _, before = pipeline._open(llama_folder, tmp_path / "bundle", config, Progress())
    with pytest.raises(IntegrityError, match=r"changed while it was exported \(model\.safetensors\)"):
        require_unchanged(llama_folder, config, before)


def test_only_where_no_precision_is_named_a_quantized_source_stays_what_it_is():
    assert [ExportConfig(name).chosen(quantized=True).precision for name in (None, "int8")] == ["source", "int8"]
    assert ExportConfig().chosen(quantized=False).precision == "int8"
    assert ExportConfig(target="qnn").chosen(quantized=True).precision == "int8"  # static graphs have their own
    with pytest.raises(InputError, match="--calibration"):
        ExportConfig(calibration="text").chosen(quantized=True)

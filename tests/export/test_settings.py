"""The settings of an export: one place for Python's defaults and the command line's."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from typing import get_type_hints

import pytest

from pastkey.errors import InputError
from pastkey.export import export
from pastkey.export.cli import export_command
from pastkey.export.settings import ExportConfig, ExportOptions


def test_python_and_the_command_line_have_the_same_settings_and_defaults():
    parser = argparse.ArgumentParser()
    export_command.add_arguments(parser)
    told = vars(parser.parse_args(["source", "--out", "bundle"]))
    fields = dataclasses.fields(ExportConfig)
    for field in fields:
        assert told[field.name] == field.default
    assert set(told) == {field.name for field in fields} | {"source", "out", "json"}
    options = get_type_hints(ExportOptions)
    assert options | {"precision": str} == get_type_hints(ExportConfig)
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
        ({"target": "qnn", "max_kl": 0.1}, "they are of pastkey's own int8"),
        ({"chunk": 64}, "--chunk and --graph auto exclude"),
        ({"target": "qnn", "precision": "fp32", "chunk": 0}, "chunk is 0; it must be"),
        ({"target": "portable", "precision": "fp32", "graph": "fused"}, "--graph fused and --target portable exclude"),
        ({"format": "gguf"}, "format is 'gguf'; it must be one of"),
        ({"format": "ort", "target": "cuda"}, "--format ort and --target cuda exclude"),
        ({"max_kl": float("nan")}, "max_kl is nan; it must be"),
        ({"precision": "fp32", "max_kl": 0.1}, "and --precision fp32 exclude"),
        ({"precision": "fp32", "calibration": "text"}, "it rounds no matrix to integers"),
        ({"precision": "fp32", "sensitivity": "table.json"}, "--calibration, --max-kl or --sensitivity and"),
        ({"graph": "static", "precision": "fp32", "format": "ort"}, "it is of graphs whose sizes change"),
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

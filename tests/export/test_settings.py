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
    ("settings", "sentence"),
    [
        ({"precision": "int3"}, "precision is 'int3'; it must be one of int8, int4, fp16, fp32"),
        ({"graph": "static"}, "the static graph is made in float32"),
        ({"target": "coreml", "precision": "int8"}, "and not in int8: export with --precision fp32"),
        ({"target": "qnn", "graph": "standard"}, "--target qnn takes graphs of fixed sizes only, and --graph standard"),
        ({"target": "qnn", "max_kl": 0.1}, "--max-kl and --sensitivity are of pastkey's own int8"),
        ({"chunk": 64}, "--chunk is of the static graph"),
        ({"target": "qnn", "precision": "fp32", "chunk": 0}, "chunk is 0; it must be a whole number of tokens from 1"),
        ({"target": "portable", "precision": "fp32", "graph": "fused"}, "with --target portable use --graph standard"),
        ({"format": "gguf"}, "format is 'gguf'; it must be one of onnx, ort"),
        ({"format": "ort", "target": "cuda"}, "for cuda: with --format ort take --target cpu or portable"),
        ({"max_kl": float("nan")}, "max_kl is nan; it must be a finite number of nats above 0"),
        ({"precision": "fp32", "max_kl": 0.1}, "fp32 keeps every matrix as it is: leave out --max-kl"),
        ({"precision": "fp32", "calibration": "text"}, "fp32 needs no calibration"),
        ({"graph": "static", "precision": "fp32", "format": "ort"}, "--format ort is of graphs whose sizes change"),
        ({"provider_options": {"a": "b"}}, "--provider-option and --allow-fallback are of another target than cpu"),
        ({"quick": True, "max_kl": 0.1}, "--quick measures no single matrix: leave out --max-kl and --sensitivity"),
        ({"shard_size": "2 apples"}, "shard_size is '2 apples'; it must be a number of bytes, such as 500MB or 2GB"),
        ({"precision": "fp32", "sensitivity": "table.json"}, "--sensitivity tells what int8 costs"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_said(settings, sentence):
    with pytest.raises(InputError) as raised:
        ExportConfig(**settings)
    assert sentence in str(raised.value)


def test_a_target_of_fixed_sizes_gets_the_static_graph_of_the_common_one():
    for target, graph in (("qnn", "auto"), ("coreml", "auto"), ("cpu", "static")):
        config = ExportConfig(precision="fp32", chunk=8, target=target, graph=graph)
        assert config.static
        assert config.common == ExportConfig(precision="fp32", graph="standard", target="cpu")
    assert not ExportConfig().static
    assert ExportConfig().common == ExportConfig()

"""Writing and proving a bundle: the manifest's fields of the graph, and a bundle that computes something else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import pastkey
from pastkey.contract import names
from pastkey.contract.bundle import CacheShift, Manifest, open_bundle
from pastkey.export import export
from pastkey.export.bundle_writer import (
    MIN_ONNXRUNTIME,
    MIN_ONNXRUNTIME_WITH_STATES,
    MIN_ONNXRUNTIME_WITH_WINDOWS,
    NEWEST_OPSET,
    BundleWriter,
    ExportedDecoder,
    _oldest_onnxruntime,
)
from pastkey.export.graft.probe.observe import Observation, observe
from pastkey.export.graft.trace import GraphChoice, trace
from pastkey.export.graph.clean import clean
from pastkey.export.graph.write import embedding_rows
from pastkey.export.progress import SILENT
from pastkey.export.settings import ExportConfig
from pastkey.export.source.source import Source
from pastkey.runtime.commands.inspection import inspect
from pastkey.runtime.providers.ort import onnxruntime

from .commands import Heard
from .decoders import Plain, llama

CONTEXT = 8


@pytest.fixture(scope="module")
def decoder():
    module = Plain()
    observation = observe(module, CONTEXT)
    model = trace(module, observation, "standard", CONTEXT)
    clean(model, module, observation.geometry, observation.vocab_size)
    return ExportedDecoder(
        Source(module, "Plain", CONTEXT), model, observation, GraphChoice("standard", "a test"), CacheShift("a test")
    )


def manifest_of(decoder: ExportedDecoder, folder: Path, **changes: Any) -> Manifest:
    """What is written of the decoder with some fields changed."""
    writer = BundleWriter(dataclasses.replace(decoder, **changes), ExportConfig(precision="fp32"), SILENT)
    return writer.write(decoder.model.clone(), folder)[0].manifest


@pytest.mark.parametrize(
    ("graph", "window", "oldest"),
    [
        ("standard", 3, MIN_ONNXRUNTIME),
        ("fused", None, MIN_ONNXRUNTIME),
        ("fused", 3, MIN_ONNXRUNTIME_WITH_WINDOWS),
    ],
)
def test_a_window_in_the_fused_graph_asks_for_a_newer_onnxruntime(graph, window, oldest, decoder, tmp_path):
    layers = tuple(dataclasses.replace(layer, window=window) for layer in decoder.observation.layers)
    observation = Observation(layers, decoder.observation.vocab_size)
    changes = {"observation": observation, "choice": GraphChoice(graph, "a test")}
    assert manifest_of(decoder, tmp_path, **changes).min_onnxruntime == oldest


@pytest.mark.parametrize("padding", [True, False])
def test_the_manifest_says_whether_rows_may_be_padded(padding, decoder, tmp_path):
    assert manifest_of(decoder, tmp_path, padding=padding).padding == padding


def test_a_graph_of_a_newer_opset_asks_for_the_onnxruntime_that_verified_it():
    assert _oldest_onnxruntime(NEWEST_OPSET, windows=False, states=False) == MIN_ONNXRUNTIME
    assert _oldest_onnxruntime(NEWEST_OPSET, windows=True, states=True) == MIN_ONNXRUNTIME_WITH_STATES
    assert _oldest_onnxruntime(NEWEST_OPSET + 1, windows=True, states=False) == onnxruntime.__version__


# --- shards -------------------------------------------------------------------------------------------------------
SHARD = 9_000  # bytes


@pytest.mark.parametrize(
    ("precision", "settings"),
    [
        ("int8", {"generate": True, "format": "ort"}),
        pytest.param("fp32", {"graph": "static"}, marks=pytest.mark.slow),
        pytest.param("int8", {"target": "qnn"}, marks=pytest.mark.matrix),
        pytest.param("int4", {}, marks=pytest.mark.matrix),
    ],
    ids=["int8", "static", "static-int8", "int4"],
)
def test_a_bundle_in_shards_is_the_same_model(precision, settings, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_rows, "_LARGE", 1)  # rows are read from a shard
    whole = exported("llama", precision).bundle.path
    size = 4 * SHARD if precision == "fp32" or "target" in settings else SHARD
    settings = settings | {"context_length": 40, "shard_size": size, "progress": (heard := Heard())}
    report = export(llama(), tmp_path / "bundle", precision, **settings)
    heard.require_planned()
    bundle = open_bundle(report.path, verify=True)
    sizes = [p.stat().st_size for p in bundle.path.glob("onnx/*") if names.is_weights_file(p.name)]
    assert len(sizes) > 2
    assert max(sizes) < size
    if "target" in settings:
        return
    texts = [pastkey.load(path, threads=1).generate([3, 1, 4], max_new_tokens=20).ids for path in (bundle.path, whole)]
    assert texts[0] == texts[1]
    shards = [p.name for p in bundle.path.glob("onnx/model*") if names.is_weights_file(p.name)]
    declared = json.loads((bundle.path / names.CONFIG).read_text())["transformers.js_config"]
    assert declared["use_external_data_format"] == {bundle.all_logits_graph.name: len(shards)}
    assert inspect(bundle.path).weight_bytes == sum(sizes)

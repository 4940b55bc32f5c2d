"""Writing and proving a bundle: what the manifest says of the graph, and a bundle that computes something else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pastkey.export.bundle_writer import (
    MIN_ONNXRUNTIME,
    MIN_ONNXRUNTIME_WITH_WINDOWS,
    NEWEST_OPSET,
    BundleWriter,
    Decoder,
    _oldest_onnxruntime,
)
from pastkey.export.graft.probe.observe import Observation, observe
from pastkey.export.graft.trace import GraphChoice, trace
from pastkey.export.graph.clean import clean
from pastkey.export.progress import SILENT
from pastkey.export.settings import ExportConfig
from pastkey.export.source.source import Source
from pastkey.runtime.providers.ort import onnxruntime

from .decoders import Plain

CONTEXT = 8


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    module = Plain()
    observation = observe(module, CONTEXT)
    model = trace(module, observation, "standard", CONTEXT)
    clean(model, module, observation.geometry, observation.vocab_size)
    return Decoder(Source(module, "Plain", CONTEXT), model, observation, GraphChoice("standard", "a test"))


def writer_of(decoder: Decoder) -> BundleWriter:
    return BundleWriter(decoder, ExportConfig(precision="fp32"), SILENT)


@pytest.mark.parametrize(
    ("graph", "window", "oldest"),
    [
        ("standard", 3, MIN_ONNXRUNTIME),
        ("fused", None, MIN_ONNXRUNTIME),
        ("fused", 3, MIN_ONNXRUNTIME_WITH_WINDOWS),
    ],
)
def test_a_window_in_the_fused_graph_asks_for_a_newer_onnxruntime(
    graph: str, window: int | None, oldest: str, decoder: Decoder, tmp_path: Path
) -> None:
    layers = tuple(dataclasses.replace(layer, window=window) for layer in decoder.observation.layers)
    observation = Observation(layers, decoder.observation.vocab_size)
    decoder = dataclasses.replace(decoder, observation=observation, choice=GraphChoice(graph, "a test"))
    bundle, _ = writer_of(decoder).write(decoder.model.clone(), tmp_path)
    assert bundle.manifest.min_onnxruntime == oldest


@pytest.mark.parametrize("padding", [True, False])
def test_the_manifest_says_whether_rows_may_be_padded(padding: bool, decoder: Decoder, tmp_path: Path) -> None:
    bundle, _ = writer_of(dataclasses.replace(decoder, padding=padding)).write(decoder.model.clone(), tmp_path)
    assert bundle.manifest.padding == padding


def test_a_graph_of_a_newer_opset_asks_for_the_onnxruntime_that_verified_it() -> None:
    assert _oldest_onnxruntime(NEWEST_OPSET, windows=False) == MIN_ONNXRUNTIME
    assert _oldest_onnxruntime(NEWEST_OPSET, windows=True) == MIN_ONNXRUNTIME_WITH_WINDOWS
    assert _oldest_onnxruntime(NEWEST_OPSET + 1, windows=True) == onnxruntime.__version__

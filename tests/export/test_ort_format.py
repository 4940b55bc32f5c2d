"""`--format ort`: one more file, which plain onnxruntime runs with nothing beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import ParityError
from pastkey.export import export, ort_format
from pastkey.export.graph.write import embedding_rows
from pastkey.runtime import Engine

from .decoders import Plain, llama
from .plain_loop import Text, open_graph

CONTEXT, PROMPT = 40, [3, 1, 4, 1, 5]


def test_the_file_is_one_and_lists_its_operators(tmp_path, monkeypatch):
    """tests/conformance runs it."""
    monkeypatch.setattr(embedding_rows, "_LARGE", 1)  # so that the int8 graph is handed the embedding's rows
    export(llama(), tmp_path / "bundle", context_length=CONTEXT, format="ort")
    bundle = open_bundle(tmp_path / "bundle", verify=True)
    assert {names.ORT_GRAPH, names.ORT_OPERATORS} <= set(bundle.manifest.files)
    assert not [*bundle.path.glob(".*"), *bundle.path.glob("onnx/ort_source*")]
    listed = (bundle.path / names.ORT_OPERATORS).read_text(encoding="utf-8")
    assert "com.microsoft;1;GroupQueryAttention,MatMulNBits," in listed
    assert str(tmp_path) not in listed
    alone = open_graph(Path(shutil.copy(bundle.path / names.ORT_GRAPH, tmp_path / "alone.ort")))
    assert names.EMBEDDING_ROWS not in [value.name for value in alone.get_inputs()]


@pytest.mark.slow
def test_it_gives_the_logits_of_every_position_when_it_is_asked_to(tmp_path):
    export(llama(), tmp_path / "bundle", precision="fp32", context_length=CONTEXT, format="ort")
    bundle = open_bundle(tmp_path / "bundle")
    text = Text(open_graph(bundle.path / names.ORT_GRAPH), last=5)
    expected = Engine(bundle, graph="all_logits").forward([PROMPT])[0]
    np.testing.assert_allclose(text.read(PROMPT), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    logits = ort_format._logits
    scales = {ort_format.OrtBundle: 1.001}
    monkeypatch.setattr(ort_format, "_logits", lambda one, ids: scales.get(type(one), 1) * logits(one, ids))
    sentence = r"in the ORT format of pastkey\.onnx logits differ by .*e-0.* of the largest logit \(limit 1e-05\)"
    with pytest.raises(ParityError, match=sentence):
        export(Plain(), tmp_path / "bundle", precision="fp32", context_length=CONTEXT, format="ort")
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_fails_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ort_format, "_TOOL", "onnxruntime.tools.no_such_tool")
    with pytest.raises(ParityError, match=r"cannot write the graph in its ORT format \(.*no_such_tool.*--format onnx$"):
        export(Plain(), tmp_path / "bundle", precision="fp32", context_length=CONTEXT, format="ort")
    assert not list(tmp_path.iterdir())

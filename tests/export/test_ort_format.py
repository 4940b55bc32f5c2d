"""`--format ort`: one more file, which plain onnxruntime runs with nothing beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import pastkey
from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import ParityError
from pastkey.export import export, ort_format
from pastkey.export.graph.write import embedding_rows
from pastkey.runtime import Engine

from .decoders import Plain, llama
from .plain_loop import open_graph, run_chunks

CONTEXT, PROMPT, NEW = 40, [3, 1, 4, 1, 5], 12


def greedy(graph: Path) -> list[int]:
    """By plain onnxruntime, which gets the prompt at once and then token after token."""
    ids = list(PROMPT)
    for _ in range(NEW):  # anew for each token, in the chunks that a cache takes
        chunks = [PROMPT, *([token] for token in ids[len(PROMPT) :])]
        ids.append(int(run_chunks(graph, chunks)[-1].argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize(
    ("build", "settings", "operators"),
    [
        (llama, {"precision": "int8"}, "com.microsoft;1;GroupQueryAttention,MatMulNBits,"),
        pytest.param(llama, {"precision": "fp32", "graph": "standard"}, "Softmax", marks=pytest.mark.slow),
        pytest.param(llama, {"precision": "fp16"}, "GroupQueryAttention", marks=pytest.mark.matrix),
        pytest.param(
            *(lambda: Plain(size=10, context=CONTEXT), {"precision": "int8", "target": "portable"}, "MatMul"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["int8", "standard", "fp16", "portable"],
)
def test_the_file_alone_gives_the_bundles_tokens(build, settings, operators, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_rows, "_LARGE", 1)  # so that the int8 graph is handed the embedding's rows
    export(build(), tmp_path / "bundle", context_length=CONTEXT, format="ort", **settings)
    bundle = open_bundle(tmp_path / "bundle", verify=True)
    assert {names.ORT_GRAPH, names.ORT_OPERATORS} <= set(bundle.manifest.files)
    assert not [*bundle.path.glob(".*"), *bundle.path.glob("onnx/ort_source*")]
    listed = (bundle.path / names.ORT_OPERATORS).read_text(encoding="utf-8")
    assert operators in listed
    assert str(tmp_path) not in listed
    alone = tmp_path / "alone.ort"
    shutil.copy(bundle.path / names.ORT_GRAPH, alone)
    assert [value.name for value in open_graph(alone).get_inputs() if value.name == names.EMBEDDING_ROWS] == []
    expected = pastkey.load(bundle.path, threads=1).generate(PROMPT, max_new_tokens=NEW)
    assert greedy(alone)[: len(expected.ids)] == expected.ids


@pytest.mark.slow
def test_it_gives_the_logits_of_every_position_when_it_is_asked_to(tmp_path):
    export(llama(), tmp_path / "bundle", precision="fp32", context_length=CONTEXT, format="ort")
    bundle = open_bundle(tmp_path / "bundle")
    session = open_graph(bundle.path / names.ORT_GRAPH)
    past = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith(names.PAST_PREFIX)
    }
    ids = np.array([PROMPT])
    lengths = {names.SEQLENS_K: np.array([4], np.int32), names.TOTAL_SEQUENCE_LENGTH: np.array(5, np.int32)}
    feeds = {names.INPUT_IDS: ids, names.POSITION_IDS: np.arange(5)[None], names.LOGITS_START: np.array([-5])}
    found = session.run([names.LOGITS], feeds | lengths | past)[0]
    expected = Engine(bundle, graph="all_logits").forward(ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_file_that_computes_something_else_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    logits = ort_format._logits
    monkeypatch.setattr(ort_format, "_logits", lambda graph, ids: 1.001 * logits(graph, ids))
    sentence = r"in the ORT format of pastkey\.onnx logits differ by .*e-0.* of the largest logit \(limit 1e-05\)"
    with pytest.raises(ParityError, match=sentence):
        export(Plain(), tmp_path / "bundle", precision="fp32", context_length=CONTEXT, format="ort")
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_fails_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ort_format, "_TOOL", "onnxruntime.tools.no_such_tool")
    with pytest.raises(ParityError, match=r"cannot write the graph in its ORT format \(.*no_such_tool.*--format onnx$"):
        export(Plain(), tmp_path / "bundle", precision="fp32", context_length=CONTEXT, format="ort")
    assert not list(tmp_path.iterdir())

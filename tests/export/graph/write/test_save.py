"""Two graphs over one weights file, and nothing in them that only passes need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from pastkey.contract import names
from pastkey.export.graph.write.save import count_operators, write_graphs
from pastkey.export.quantize.adapters import take_adaptable
from pastkey.export.quantize.rounding.rewrite import quantize
from pastkey.precisions import PRECISIONS

from ...small_graphs import Array, model_of

TEXT = (
    "g (float[1,T,64] x, float[64,64] w, float[64,64] v) => (float[1,T,64] logits)"
    " { h = MatMul(x, w) logits = MatMul(h, v) }"
)


def written(folder: Path, w: Array, v: Array) -> tuple[int, onnx.ModelProto, onnx.ModelProto]:
    """The bytes that are told, and the two graphs without their weights."""
    told = write_graphs(model_of(TEXT, w=w, v=v), folder, "fp32")
    all_logits, last_logits = (
        onnx.load(folder / name, load_external_data=False)
        for name in (PRECISIONS["fp32"].graph, names.LAST_LOGITS_GRAPH)
    )
    return told, all_logits, last_logits


def places(model: onnx.ModelProto) -> dict[str, dict[str, str]]:
    return {w.name: {e.key: e.value for e in w.external_data} for w in model.graph.initializer if w.external_data}


def test_both_graphs_read_one_file_which_has_the_weights_told(tmp_path):
    rng = np.random.default_rng(0)
    w, v = (rng.normal(size=(64, 64)).astype(np.float32) for _ in range(2))
    told, all_logits, last_logits = written(tmp_path, w, v)
    assert places(all_logits) == places(last_logits)
    assert set(places(all_logits)) == {"w", "v"}
    (file,) = tmp_path.rglob("*.onnx_data")
    assert file.stat().st_size == told == w.nbytes + v.nbytes
    stored = onnx.load(tmp_path / PRECISIONS["fp32"].graph)
    for tensor in stored.graph.initializer:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), {"w": w, "v": v}[tensor.name])


def test_the_mark_of_an_int8_head_is_in_no_file(tmp_path):
    w = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    model = model_of(TEXT, w=w, v=w + 1)
    quantize(model)
    take_adaptable(model)
    assert any(node.metadata_props for node in model.graph)
    write_graphs(model, tmp_path, "int8")
    graphs = list(tmp_path.rglob("*.onnx"))
    assert len(graphs) == 2
    for graph in graphs:
        assert not any(node.metadata_props for node in ir.load(graph).graph)


def test_the_manifest_counts_the_operators_of_the_all_logits_graph(exported):
    made = exported("llama", "int8")
    assert dict(made.bundle.manifest.operators) == count_operators(ir.load(made.bundle.all_logits_graph))

"""Values inside a graph are those that the graph computes, and looking leaves no trace."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pastkey.contract import names
from pastkey.export.quantize.calibrate.activations import probing

from ...plain_loop import run_chunks


def test_a_probe_sees_values_inside_and_leaves_the_graph_and_the_folder_as_they_were(exported):
    graph = exported("llama").bundle.all_logits_graph
    model = ir.load(graph)
    before, files = ir.to_proto(model).SerializeToString(), sorted(graph.parent.iterdir())
    head = next(node for node in model.graph if node.outputs[0].name == names.LOGITS)
    inside = str(head.inputs[0].name)
    ids = np.arange(9)
    with probing(model, graph.parent, [names.LOGITS, inside]) as probe:
        found = probe(ids)
    assert found[inside].shape == (9, 48)
    np.testing.assert_allclose(found[names.LOGITS], run_chunks(graph, [ids.tolist()]), rtol=1e-5, atol=1e-6)
    embedding = exported("llama").weights()["model.embed_tokens.weight"]
    np.testing.assert_allclose(found[inside] @ embedding.T, found[names.LOGITS], rtol=1e-4, atol=1e-5)
    assert ir.to_proto(model).SerializeToString() == before
    assert sorted(graph.parent.iterdir()) == files


def test_weights_that_were_changed_in_memory_count(exported, tmp_path):
    graph = exported("llama").bundle.all_logits_graph
    model = ir.load(graph)
    value = model.graph.initializers["model.layers.0.mlp.up_proj.weight"]
    value.const_value = ir.Tensor(value.const_value.numpy() * 2, name=value.name)
    ids = np.arange(9)
    with probing(model, graph.parent, [names.LOGITS]) as probe:
        found = probe(ids)[names.LOGITS]
    assert not list(graph.parent.glob("probe*"))
    ir.save(model, tmp_path / "changed.onnx", external_data="changed.onnx_data")
    np.testing.assert_allclose(found, run_chunks(tmp_path / "changed.onnx", [ids.tolist()]), rtol=1e-5, atol=1e-6)
    assert np.abs(found - run_chunks(graph, [ids.tolist()])).max() > 1e-3

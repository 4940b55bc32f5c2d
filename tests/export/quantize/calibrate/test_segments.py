"""Values captured segment by segment are those of the whole graph, and each is held for one segment only."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.contract import names
from pastkey.export.quantize.calibrate.activations import probing
from pastkey.export.quantize.calibrate.segments import captured
from pastkey.export.quantize.rounding.matrices import matmul_weight

from ....shared import divided
from ...plain_loop import run_chunks

WINDOWS = [np.random.default_rng(seed).integers(0, 37, size) for seed, size in enumerate((30, 30, 11))]


def read_by_matmuls(model: ir.Model) -> list[str]:
    """The activations that weights are multiplied with, made by nodes."""
    read = [node.inputs[0] for node in model.graph if matmul_weight(node) is not None]
    return list(dict.fromkeys(str(value.name) for value in read if value is not None and value.producer() is not None))


@pytest.mark.parametrize(
    "name", divided(["llama", "gpt2", "one_block_twice", "nano_gpt"], quick=["llama"], ci=["one_block_twice"])
)
def test_every_segmentation_gives_the_values_of_one_run(name, exported):
    graph = exported(name).bundle.all_logits_graph
    files = sorted(graph.parent.iterdir())
    wanted = [*read_by_matmuls(ir.load(graph)), names.LOGITS]
    with probing(ir.load(graph), graph.parent, wanted) as probe:
        whole = [probe(ids) for ids in WINDOWS]
    runs: dict[int, list[dict[str, np.ndarray]]] = {}
    for kept_bytes in (1, 25, 10**9):
        captures = [dict[str, np.ndarray]() for _ in WINDOWS]
        order, sizes = list[str](), list[int]()
        sizes_of = dict.fromkeys(wanted, 10)
        for segment in captured(ir.load(graph), graph.parent, WINDOWS, sizes_of, kept_bytes=kept_bytes):
            order += segment.wanted
            sizes.append(len(segment.wanted))
            for found, values in zip(captures, segment, strict=True):
                assert set(values) == set(segment.wanted)
                found.update(values)
        assert sorted(order) == sorted(wanted)
        assert max(sizes) <= max(kept_bytes // 10, 1)
        runs[kept_bytes] = captures
    assert sorted(graph.parent.iterdir()) == files
    for one, few, all_at_once, packed in zip(*runs.values(), whole, strict=True):
        for value in wanted:
            np.testing.assert_array_equal(one[value], all_at_once[value])
            np.testing.assert_array_equal(few[value], all_at_once[value])
            # onnxruntime adds the terms of a packed weight's products in another order.
            largest = np.abs(packed[value]).max()
            np.testing.assert_allclose(one[value], packed[value], rtol=0, atol=1e-5 * largest)


# --- values inside a graph are those that the graph computes, and looking leaves no trace -----------------------------
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

"""Static graphs in int8 for QNN: MatMuls between QuantizeLinear and DequantizeLinear, over one data file."""

from collections import Counter
from pathlib import Path

import onnx
import pytest

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.export import export
from pastkey.export.graph.static.qdq import MASKED

from ...decoders import llama


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("qdq") / "b"
    return export(llama(), out, precision="int8", target="qnn", chunk=7, context_length=40)


@pytest.fixture(scope="module")
def bundle(report):
    return open_bundle(report.path)


def test_it_is_verified_and_measured_on_the_processor(report):
    manifest = report.manifest
    assert (manifest.precision, manifest.target, manifest.graph) == ("int8", "qnn", "static")
    assert manifest.static is not None
    assert manifest.static.masked == MASKED
    assert manifest.parity["fp32"]["reference"] == "source"
    assert set(manifest.parity["int8"]["checks"]) >= {"prefill", "decode", "greedy", "float32"}
    assert manifest.parity["fp32"]["ok"]
    assert manifest.parity["int8"]["ok"]
    assert 0 < manifest.quality["kl_divergence"] < 0.01


def test_only_matmuls_are_quantized_to_8_bits_with_16_bits_of_activations(bundle):
    for path in bundle.static_graphs:
        model = onnx.load(path)
        makers = {output: node for node in model.graph.node for output in node.output}
        kinds = {w.name: w.data_type for w in model.graph.initializer}
        zero_points = Counter(kinds[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear")
        assert set(zero_points) == {onnx.TensorProto.UINT16}
        products = [node for node in model.graph.node if node.op_type == "MatMul"]
        assert len(products) == 7 * 2 + 2 * 2 + 1  # projections, attention, and the head that is tied to the embedding
        for node in products:
            assert [makers[name].op_type for name in node.input] == ["DequantizeLinear"] * 2
        weights = [n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in kinds]
        assert Counter(kinds[name] for name in weights) == {onnx.TensorProto.UINT8: 7 * 2 + 1}
        assert not {"Where", "Shape"} & {node.op_type for node in model.graph.node}


def test_both_graphs_round_activations_alike(bundle):
    """Else a token would be another one by the graph of a chunk than by that of one token."""
    scales = []
    for path in bundle.static_graphs:
        model = onnx.load(path)
        known = {w.name: onnx.numpy_helper.to_array(w) for w in model.graph.initializer}
        steps = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
        scales.append({n.input[0]: (float(known[n.input[1]]), int(known[n.input[2]])) for n in steps})
    assert scales[0] == scales[1]
    assert len(scales[0]) > 20


def test_both_graphs_share_a_data_file(bundle):
    found = {path.name for path in bundle.all_logits_graph.parent.iterdir()}
    data = Path(names.STATIC_DATA).name
    assert found == {
        "model_quantized.onnx", "model_quantized.onnx_data", data, "pastkey_decode.onnx", "pastkey_prefill.onnx"
    }  # fmt: skip
    size = (bundle.path / names.STATIC_DATA).stat().st_size
    for path in bundle.static_graphs:
        model = onnx.load(path, load_external_data=False)
        files = {e.value for w in model.graph.initializer for e in w.external_data if e.key == "location"}
        assert files == {data}
        lengths = [int(e.value) for w in model.graph.initializer for e in w.external_data if e.key == "length"]
        assert size < 1.2 * sum(lengths)

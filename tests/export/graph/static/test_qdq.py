"""Static graphs in int8 for QNN: MatMuls between QuantizeLinear and DequantizeLinear, over one data file."""

from collections import Counter
from pathlib import Path

import onnx
import pytest
from onnx.numpy_helper import to_array as numbers

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.export import export
from pastkey.export.graph.static.qdq import MASKED

from ...decoders import llama

UINT8, UINT16 = onnx.TensorProto.UINT8, onnx.TensorProto.UINT16


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("qdq") / "b"
    export(llama(), out, precision="int8", target="qnn", chunk=7, context_length=40)
    return open_bundle(out)


def test_it_is_verified_and_measured_on_the_processor(bundle):
    manifest = bundle.manifest
    assert (manifest.precision, manifest.target, manifest.graph) == ("int8", "qnn", "static")
    assert manifest.static.masked == MASKED
    assert manifest.parity["fp32"]["reference"] == "source"
    assert set(manifest.parity["int8"]["checks"]) >= {"prefill", "decode", "greedy", "float32"}
    assert (manifest.parity["fp32"]["ok"], manifest.parity["int8"]["ok"]) == (True, True)
    assert 0 < manifest.quality["kl_divergence"] < 0.01


def test_only_matmuls_are_quantized_to_8_bits_and_activations_to_16_alike_in_both_graphs(bundle):
    """Else a token would be another one by the graph of a chunk than by that of one token."""
    scales = []
    for path in bundle.static_graphs:
        model = onnx.load(path)
        known = {w.name: w for w in model.graph.initializer}
        makers = {output: node for node in model.graph.node for output in node.output}
        rounded = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        assert {known[node.input[2]].data_type for node in rounded} == {UINT16}
        scales.append({node.input[0]: [float(numbers(known[name])) for name in node.input[1:]] for node in rounded})
        products = [node for node in model.graph.node if node.op_type == "MatMul"]
        assert len(products) == 7 * 2 + 2 * 2 + 1  # projections, attention, and the head that is tied to the embedding
        assert {makers[name].op_type for node in products for name in node.input} == {"DequantizeLinear"}
        stored = [node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"]
        assert Counter(known[name].data_type for name in stored if name in known) == {UINT8: 7 * 2 + 1}
        assert not {"Where", "Shape"} & {node.op_type for node in model.graph.node}
    assert scales[0] == scales[1]
    assert len(scales[0]) > 20


def test_both_graphs_share_a_data_file(bundle):
    for path in bundle.static_graphs:
        model = onnx.load(path, load_external_data=False)
        entries = [entry for w in model.graph.initializer for entry in w.external_data]
        assert {entry.value for entry in entries if entry.key == "location"} == {Path(names.STATIC_DATA).name}
        lengths = sum(int(entry.value) for entry in entries if entry.key == "length")
        assert (bundle.path / names.STATIC_DATA).stat().st_size < 1.2 * lengths

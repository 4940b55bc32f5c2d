"""The small reader of ONNX text gives what onnx's own parser gives."""

from __future__ import annotations

import numpy as np
import pytest

from .onnx_text import encode_model
from .runtime.conftest import Tiny, tiny_graph

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnx.parser")

TINY = Tiny.random([(8, 8), (16, 8)], context_length=24)


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("graph", ["fused", "standard"])
def test_the_decoder_of_the_runtimes_tests_is_what_onnx_reads(graph, last_only):
    text = tiny_graph(TINY, graph, last_only=last_only)
    expected = onnx.parser.parse_model(text)
    expected.graph.initializer.extend(onnx.numpy_helper.from_array(w, name) for name, w in TINY.weights.items())
    encoded, _ = encode_model(text, TINY.weights)
    assert onnx.ModelProto.FromString(encoded) == expected


def test_weights_in_a_file_of_their_own_are_found_there(tmp_path):
    encoded, data = encode_model(tiny_graph(TINY, "fused", last_only=False), TINY.weights, "weights.bin")
    (tmp_path / "model.onnx").write_bytes(encoded)
    (tmp_path / "weights.bin").write_bytes(data)
    loaded = onnx.load(tmp_path / "model.onnx")
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in loaded.graph.initializer}
    assert found.keys() == TINY.weights.keys()
    for name, weight in TINY.weights.items():
        np.testing.assert_array_equal(found[name], weight)


def test_what_is_no_node_is_not_passed_over():
    text = '<ir_version: 8, opset_import: ["": 17]>\nx (float[1] a) => (float[1] b) {\n b = Neg(a)\n oops\n}'
    with pytest.raises(AssertionError, match="not understood: oops"):
        encode_model(text, {})

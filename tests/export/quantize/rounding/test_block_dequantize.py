"""Portable bundles multiply by ONNX's own operators, and compute what MatMulNBits does."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from pastkey.contract import names
from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.export import export
from pastkey.export.quantize.rounding.block_dequantize import dequantize_linear
from pastkey.export.quantize.rounding.blocks import quantize_blocks
from pastkey.export.quantize.rounding.int4_blocks import Gptq
from pastkey.runtime.engine.engine import Engine

from ....oracles.dequantized import dequantize, dequantize_blocks
from ...decoders import Plain, llama

IDS = np.arange(12) % 7


@pytest.mark.parametrize("columns", [32, 33, 48, 7])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_operator_gives_the_matrix_transposed(columns, bits):
    matrix = np.random.default_rng(0).normal(size=(6, columns)).astype(np.float32)
    if bits == 8:
        blocks = quantize_blocks(matrix, 16)
        expected = dequantize_blocks(blocks)
    else:
        in_4_bits = Gptq(np.eye(columns, dtype=np.float32)).round(matrix, 16).blocks
        expected = dequantize(in_4_bits)
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="weights"), ir_version=10)
    node = dequantize_linear(model, "w", blocks if bits == 8 else in_4_bits)
    model.graph.append(node)
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(node.outputs[0])
    (found,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {})
    np.testing.assert_array_equal(found[:columns], expected.T)
    assert found.shape == (-(-columns // 16) * 16, 6)
    assert not found[columns:].any()


def reference_logits(bundle: Bundle, ids: np.ndarray) -> np.ndarray:
    """(T, V), by onnx's own evaluator of the operators' definitions, from an empty cache."""
    feeds = {
        names.INPUT_IDS: ids[None],
        names.ATTENTION_MASK: np.ones((1, len(ids)), np.int64),
        names.POSITION_IDS: np.arange(len(ids))[None],
    }
    for i, layer in enumerate(bundle.manifest.layers):
        feeds[names.past_key(i)] = np.zeros((1, layer.kv_heads, 0, layer.key_head_size), np.float32)
        feeds[names.past_value(i)] = np.zeros((1, layer.kv_heads, 0, layer.value_head_size), np.float32)
    model = onnx.load(bundle.all_logits_graph)
    outputs = [value.name for value in model.graph.output]
    logits: np.ndarray = dict(zip(outputs, ReferenceEvaluator(model).run(None, feeds), strict=True))["logits"][0]
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("build", [llama, pytest.param(lambda: Plain(width=40), marks=pytest.mark.matrix)])
def test_a_portable_bundle_computes_what_matmulnbits_does(build, precision, tmp_path):
    logits = {}
    for target in ("portable", "cpu"):
        export(build(), tmp_path / target, precision=precision, target=target, graph="standard", context_length=40)
        bundle = open_bundle(tmp_path / target)
        logits[target] = Engine(bundle, graph="all_logits").forward(IDS[None])[0]
    np.testing.assert_array_equal(logits["portable"], logits["cpu"])

    bundle = open_bundle(tmp_path / "portable")
    for path in (bundle.all_logits_graph, bundle.last_logits_graph):
        model = onnx.load(path)
        assert {node.domain for node in model.graph.node} == {""}
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 21)]
        onnx.checker.check_model(path)
        operators = Counter(node.op_type for node in model.graph.node)
        assert operators["DequantizeLinear"] >= 3
    # The definition multiplies activations in float32, where the kernels take them in int8.
    off = np.abs(reference_logits(bundle, IDS) - logits["portable"]).max() / np.abs(logits["portable"]).max()
    assert off < 0.03

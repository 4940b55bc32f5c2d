"""int8 in blocks: the arrays, and the products and tables of a graph."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pastkey.errors import InputError
from pastkey.export.blocks import choose_block_size, dequantize_blocks, quantize_blocks
from pastkey.export.quantize import quantize

from .blocks import scales_of
from .conftest import Export
from .plain_loop import onnxruntime

Array = npt.NDArray[Any]
SCALES = ["Cast", "Mul"]  # of bytes, folded at load
GATHERED = ["Gather", "Cast", "Sub", "Gather", "Unsqueeze", "Shape", "Concat", "Mul", "Reshape"]  # of a quantized table

MATRICES = st.tuples(st.integers(1, 5), st.integers(1, 70)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.floats(-(2.0**100), 2.0**100, width=32))
)


# --- arrays -------------------------------------------------------------------------------------------------------
@given(MATRICES, st.sampled_from([16, 32]))
@settings(max_examples=200, deadline=None)
def test_a_round_trip_errs_by_half_a_step_at_most(matrix: Array, block_size: int) -> None:
    quantized = quantize_blocks(matrix, block_size)
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    assert quantized.data.shape == (rows, blocks, block_size)
    assert quantized.scales.shape == (rows, blocks)
    assert (quantized.data.dtype, quantized.scales.dtype) == (np.uint8, np.float32)
    found = dequantize_blocks(quantized)
    assert found.shape == matrix.shape
    step = np.repeat(quantized.scales, block_size, axis=1)[:, :columns].astype(np.float64)
    # numbers below the smallest normal one may be stored as zero
    slack = np.maximum(step * 0.5001, np.finfo(np.float32).tiny * 127)
    assert (np.abs(found.astype(np.float64) - matrix) <= slack).all()


@given(MATRICES, st.sampled_from([16, 32]))
@settings(max_examples=100, deadline=None)
def test_quantizing_what_was_dequantized_errs_no_further_than_once(matrix: Array, block_size: int) -> None:
    once = quantize_blocks(matrix, block_size)
    twice = quantize_blocks(dequantize_blocks(once), block_size)
    step = np.repeat(once.scales, block_size, axis=1)[:, : matrix.shape[1]].astype(np.float64)
    slack = np.maximum(step * 0.5001, np.finfo(np.float32).tiny * 127)
    assert (np.abs(dequantize_blocks(twice).astype(np.float64) - dequantize_blocks(once)) <= slack).all()


def test_zeros_are_stored_as_zeros() -> None:
    quantized = quantize_blocks(np.zeros((2, 40), np.float32), 32)
    assert (quantized.data == 128).all()
    assert (dequantize_blocks(quantized) == 0).all()
    assert np.isfinite(quantized.scales).all()


@pytest.mark.parametrize("number", [1.0, -3.5, 1e-30, 1e30])
def test_a_constant_block_is_exact(number: float) -> None:
    matrix = np.full((1, 32), number, np.float32)
    np.testing.assert_allclose(dequantize_blocks(quantize_blocks(matrix, 32)), matrix, rtol=1e-6)


def test_a_block_too_small_to_divide_by_becomes_zero() -> None:
    matrix = np.full((1, 32), 1e-40, np.float32)
    matrix[0, 0] = -1e-40
    quantized = quantize_blocks(matrix, 32)
    assert np.isfinite(quantized.scales).all()
    assert (np.abs(dequantize_blocks(quantized)) <= 1e-37).all()


def test_both_ends_of_the_range_are_used_and_padding_is_zero() -> None:
    matrix = np.array([[-2.0, 2.0, 1.0]], np.float32)
    quantized = quantize_blocks(matrix, 16)
    assert quantized.data[0, 0, :4].tolist() == [1, 255, 192, 128]
    assert (quantized.data[0, 0, 3:] == 128).all()
    assert quantized.scales[0, 0] == pytest.approx(2 / 127)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_is_refused(number: float) -> None:
    matrix = np.ones((2, 3), np.float32)
    matrix[1, 2] = number
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_blocks(matrix, 16)


@pytest.mark.parametrize(
    ("columns", "expected"), [(1, 16), (16, 16), (17, 32), (32, 32), (48, 16), (64, 32), (80, 16), (576, 32)]
)
def test_the_block_size_with_the_fewer_bytes_is_chosen(columns: int, expected: int) -> None:
    def stored(size: int) -> int:
        return -(-columns // size) * (size + 1)

    assert choose_block_size(columns) == expected
    assert stored(expected) <= min(stored(16), stored(32))


# --- the graph ----------------------------------------------------------------------------------------------------
def graph_of(body: str, **weights: Array) -> ir.Model:
    """A graph x (2, K), i (2,) -> y with initializers."""
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": 20]>\ng (float[2,{weights["w"].shape[-2]}] x, int64[2] i'
        + "".join(f", float[{','.join(map(str, w.shape))}] {name}" for name, w in weights.items())
        + f") => (float[2,N] y) {{ {body} }}"
    )
    for value in tuple(model.graph.inputs):
        if value.name in weights:
            model.graph.inputs.remove(value)
            value.const_value = ir.Tensor(weights[value.name], name=value.name)
            model.graph.register_initializer(value)
    return model


def run(model: ir.Model, x: Array) -> Array:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"x": x, "i": np.array([3, 0], np.int64)}
    return session.run(["y"], {v.name: feeds[v.name] for v in session.get_inputs()})[0]


RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 50)).astype(np.float32)
W = RNG.normal(size=(50, 23)).astype(np.float32)  # (K, N), K no multiple of the block
BIAS = RNG.normal(size=23).astype(np.float32)


@pytest.mark.parametrize(
    ("body", "weights", "expected"),
    [
        ("y = MatMul(x, w)", {"w": W}, X @ W),
        ("t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t)", {"w": np.ascontiguousarray(W.T)}, X @ W),
        ("y = Gemm(x, w)", {"w": W}, X @ W),
        ("y = Gemm(x, w, b)", {"w": W, "b": BIAS}, X @ W + BIAS),
        ("y = Gemm <transB = 1> (x, w, b)", {"w": np.ascontiguousarray(W.T), "b": BIAS}, X @ W + BIAS),
    ],
    ids=["MatMul", "MatMul_of_a_transposed_weight", "Gemm", "Gemm_with_bias", "Gemm_transB"],
)
def test_every_form_of_a_product_is_quantized(body: str, weights: dict[str, Array], expected: Array) -> None:
    model = graph_of(body, **weights)
    if weights["w"].shape[0] == 23:  # x has K columns whichever way the weight lies
        model.graph.inputs[0].shape = ir.Shape([2, 50])
    quantize(model)
    operators = [node.op_type for node in model.graph]
    assert operators[:3] == [*SCALES, "MatMulNBits"]
    assert set(operators[3:]) <= {"Add"}
    stored = {v.name: v.const_value.numpy() for v in model.graph.initializers.values()}
    assert {name: (a.dtype.name, a.shape) for name, a in stored.items() if name != "b"} == {
        "w.blocks": ("uint8", (23, 2, 32)),
        "scales_of_2_0.codes": ("uint8", (23, 2)),
        "scales_of_2_0.factors": ("float32", (23, 1)),
    }
    # a product of 50 terms, each wrong by half a step of the weights and of the activations
    np.testing.assert_allclose(run(model, X), expected, atol=0.15)


def test_a_gathered_table_is_quantized_and_cut_to_its_width() -> None:
    table = RNG.normal(size=(5, 50)).astype(np.float32)
    model = graph_of("y = Gather(w, i)", w=table)
    quantize(model)
    assert [node.op_type for node in model.graph] == [*SCALES, *GATHERED, "Slice"]
    expected = dequantize_blocks(quantize_blocks(table, 32))[[3, 0]]
    np.testing.assert_array_equal(run(model, X[:, :5]), expected)


def test_a_tied_table_is_stored_once_for_both_uses() -> None:
    table = RNG.normal(size=(5, 48)).astype(np.float32)
    model = graph_of("e = Gather(w, i) t = Transpose <perm = [1, 0]> (w) y = MatMul(e, t)", w=table)
    quantize(model)
    data = {v.name: v.const_value.numpy() for v in model.graph.initializers.values()}
    scales = {"scales_of_3_0.codes", "scales_of_3_0.factors"}
    assert {name for name in data if data[name].size > 4} == {"w.blocks", "w.table"} | scales
    assert np.shares_memory(data["w.table"], data["w.blocks"])
    assert [node.op_type for node in model.graph] == [*SCALES, *GATHERED, "MatMulNBits"]


def test_products_that_read_one_activation_become_one() -> None:
    other = RNG.normal(size=(50, 9)).astype(np.float32)
    model = graph_of("a = MatMul(x, w) b = MatMul(x, v) c = Sigmoid(b) y = Concat <axis = 1> (a, c)", w=W, v=other)
    quantize(model)
    assert Counter(n.op_type for n in model.graph) == Counter([*SCALES, "MatMulNBits", "Split", "Sigmoid", "Concat"])
    expected = np.concatenate([X @ W, 1 / (1 + np.exp(-X @ other))], axis=1)
    np.testing.assert_allclose(run(model, X), expected, atol=0.15)


@pytest.mark.parametrize("name", ["llama", "softcap_bias_and_scale", "nano_gpt"])
def test_attention_takes_queries_keys_and_values_as_one_where_it_can(name: str, exported: Export) -> None:
    before = [n for n in exported(name).graph().graph.node if n.op_type == "GroupQueryAttention"]
    after = [n for n in exported(name, "int8").graph().graph.node if n.op_type == "GroupQueryAttention"]
    assert len(after) == len(before) > 0
    assert all(all(node.input[:3]) for node in before)
    assert all(list(node.input[1:3]) == ["", ""] for node in after) == (name != "nano_gpt")


def head_error(precise: bool, columns: int) -> float:
    """RMS error of an int8 output head on activations of (1, 2, columns), over the RMS of what it makes exactly."""
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(columns, 40)).astype(np.float32)
    x = rng.normal(size=(1, 2, columns)).astype(np.float32)
    output = "logits" if precise else "y"
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": 20]>\ng (float[1,2,{columns}] x, float[{columns},40] w) '
        f"=> (float[1,2,40] {output}) {{ {output} = MatMul(x, w) }}"
    )
    (value,) = (v for v in model.graph.inputs if v.name == "w")
    model.graph.inputs.remove(value)
    value.const_value = ir.Tensor(matrix, name="w")
    model.graph.register_initializer(value)
    quantize(model)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    weights = {v.name: v.const_value.numpy() for v in model.graph.initializers.values()}
    values = (weights["w.blocks"].astype(np.float32) - 128) * scales_of(model)["w"][..., None]
    exact = x @ values.reshape(40, -1)[:, :columns].T
    return float(np.sqrt(np.square(found - exact).mean() / np.square(exact).mean()))


def test_the_output_head_reads_what_int8_left_of_its_input_too() -> None:
    for columns in (64, 60):  # in whole blocks, and padded
        assert head_error(True, columns) < head_error(False, columns) / 50


@pytest.mark.parametrize(
    "body",
    [
        "t = Transpose <perm = [1, 0]> (x) y = MatMul(t, x)",
        "y = Gemm <alpha = 2.0> (x, w)",
        "t = Transpose <perm = [1, 0]> (x) y = Gemm <transA = 1> (t, w)",
    ],
    ids=["no_weight", "alpha", "transA"],
)
def test_what_has_no_quantized_form_is_left_alone(body: str) -> None:
    model = graph_of(body, w=W)
    quantize(model)
    assert "MatMulNBits" not in {node.op_type for node in model.graph}


def test_a_weight_that_is_not_finite_is_named() -> None:
    broken = W.copy()
    broken[3, 3] = np.nan
    with pytest.raises(InputError, match="the weight w holds NaN or infinity, which cannot be quantized"):
        quantize(graph_of("y = MatMul(x, w)", w=broken))


def test_scales_of_many_matrices_are_computed_together_and_each_gets_its_own() -> None:
    """In several steps, since the sizes stand in the graph itself."""
    matrices = {f"w{i}": RNG.normal(size=(50, 3 + i % 4)).astype(np.float32) * (i + 1) for i in range(70)}
    body = " ".join(f"a{i} = MatMul(x{i}, w{i})" for i in range(70))
    inputs = ", ".join([f"float[2,50] x{i}" for i in range(70)] + [f"float[50,{3 + i % 4}] w{i}" for i in range(70)])
    outputs = ", ".join(f"float[2,{3 + i % 4}] a{i}" for i in range(70))
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 20]>\ng ({inputs}) => ({outputs}) {{ {body} }}')
    for value in tuple(model.graph.inputs):
        if value.name in matrices:
            model.graph.inputs.remove(value)
            value.const_value = ir.Tensor(matrices[value.name], name=value.name)
            model.graph.register_initializer(value)
    quantize(model)
    assert Counter(node.op_type for node in model.graph) == {"MatMulNBits": 70, "Cast": 3, "Mul": 3, "Split": 3}
    for name, scales in scales_of(model).items():
        np.testing.assert_array_equal(scales, quantize_blocks(matrices[name].T, 32).scales)
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])

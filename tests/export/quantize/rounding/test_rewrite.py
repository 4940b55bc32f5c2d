"""int8 of a graph's MatMuls and embeddings, by rules 1 to 5."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from pastkey.errors import InputError
from pastkey.export.quantize.rounding.blocks import dequantize_blocks, quantize_blocks
from pastkey.export.quantize.rounding.rewrite import quantize

from ...blocks import scales_of
from ...small_graphs import model_of, run_model

Array = npt.NDArray[Any]
SCALES = ["Cast", "Mul"]  # of bytes, folded at load
GATHERED = ["Gather", "Cast", "Sub", "Gather", "Unsqueeze", "Shape", "Concat", "Mul", "Reshape"]  # of a quantized table


def graph_of(body: str, output: str = "y", rows: str = "2", /, **weights: Array) -> ir.Model:
    """A graph x (rows, K), i (2,) -> output with initializers."""
    inputs = "".join(f", float[{','.join(map(str, w.shape))}] {name}" for name, w in weights.items())
    return model_of(
        f"g (float[{rows},{weights['w'].shape[-2]}] x, int64[2] i{inputs}) => (float[{rows},N] {output}) {{ {body} }}",
        **weights,
    )


def run(model: ir.Model, x: Array) -> Array:
    (found,) = run_model(model, x=x, i=np.array([3, 0], np.int64))
    return found


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
def test_every_form_of_a_product_is_quantized(body, weights, expected):
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
        "scales_of_2_0.scale_codes": ("uint8", (23, 2)),
        "scales_of_2_0.row_scales": ("float32", (23, 1)),
    }
    # a dot product of 50 terms, each wrong by half a step of the weights and of the activations
    np.testing.assert_allclose(run(model, X), expected, atol=0.15)


def test_a_gathered_table_is_quantized_and_cut_to_its_width():
    table = RNG.normal(size=(5, 50)).astype(np.float32)
    model = graph_of("y = Gather(w, i)", w=table)
    quantize(model)
    assert [node.op_type for node in model.graph] == [*SCALES, *GATHERED, "Slice"]
    expected = dequantize_blocks(quantize_blocks(table, 32))[[3, 0]]
    np.testing.assert_array_equal(run(model, X[:, :5]), expected)


def test_a_tied_table_is_stored_once_for_both_uses():
    table = RNG.normal(size=(5, 48)).astype(np.float32)
    model = graph_of("e = Gather(w, i) t = Transpose <perm = [1, 0]> (w) y = MatMul(e, t)", w=table)
    quantize(model)
    data = {v.name: v.const_value.numpy() for v in model.graph.initializers.values()}
    scales = {"scales_of_3_0.scale_codes", "scales_of_3_0.row_scales"}
    assert {name for name in data if data[name].size > 4} == {"w.blocks", "w.table"} | scales
    np.testing.assert_array_equal(data["w.table"], data["w.blocks"])  # the weights file holds equal content once
    assert [node.op_type for node in model.graph] == [*SCALES, *GATHERED, "MatMulNBits"]


def error_of_product(output: str, columns: int) -> float:
    """RMS error of int8 activations (1, 2, columns) times an int8 matrix, over the RMS of what that makes."""
    rng = np.random.default_rng(1)
    matrix, x = (rng.normal(size=shape).astype(np.float32) for shape in ((columns, 40), (1, 2, columns)))
    model = graph_of(f"{output} = MatMul(x, w)", output, "1,2", w=matrix)
    quantize(model)
    blocks = model.graph.initializers["w.blocks"].const_value
    assert blocks is not None
    dequantized = (blocks.numpy().astype(np.float32) - 128) * scales_of(model)["w"][..., None]
    exact = x @ dequantized.reshape(40, -1)[:, :columns].T
    return float(np.sqrt(np.square(run(model, x) - exact).mean() / np.square(exact).mean()))


@pytest.mark.parametrize("columns", [64, 60], ids=["whole_blocks", "padded"])
def test_the_output_head_reads_what_int8_left_of_its_input_too(columns):
    assert error_of_product("logits", columns) < error_of_product("y", columns) / 50


@pytest.mark.parametrize(
    "body",
    [
        "t = Transpose <perm = [1, 0]> (x) y = MatMul(t, x)",
        "y = Gemm <alpha = 2.0> (x, w)",
        "t = Transpose <perm = [1, 0]> (x) y = Gemm <transA = 1> (t, w)",
    ],
    ids=["no_weight", "alpha", "transA"],
)
def test_what_has_no_quantized_form_is_left_alone(body):
    model = graph_of(body, w=W)
    quantize(model)
    assert "MatMulNBits" not in {node.op_type for node in model.graph}


def test_a_weight_that_is_not_finite_is_named():
    broken = W.copy()
    broken[3, 3] = np.nan
    with pytest.raises(InputError, match="the weight w holds NaN or infinity, which cannot be quantized"):
        quantize(graph_of("y = MatMul(x, w)", w=broken))


def test_scales_of_many_matrices_are_computed_together_and_each_gets_its_own():
    """In several steps, since the sizes stand in the graph itself."""
    matrices = {f"w{i}": RNG.normal(size=(50, 3 + i % 4)).astype(np.float32) * (i + 1) for i in range(70)}
    body = " ".join(f"a{i} = MatMul(x{i}, w{i})" for i in range(70))
    inputs = ", ".join([f"float[2,50] x{i}" for i in range(70)] + [f"float[50,{3 + i % 4}] w{i}" for i in range(70)])
    outputs = ", ".join(f"float[2,{3 + i % 4}] a{i}" for i in range(70))
    model = model_of(f"g ({inputs}) => ({outputs}) {{ {body} }}", **matrices)
    quantize(model)
    assert Counter(node.op_type for node in model.graph) == {"MatMulNBits": 70, "Cast": 3, "Mul": 3, "Split": 3}
    for name, scales in scales_of(model).items():
        np.testing.assert_array_equal(scales, quantize_blocks(matrices[name].T, 32).scales)
    x = {f"x{i}": RNG.normal(size=(2, 50)).astype(np.float32) for i in range(70)}
    for number, found in enumerate(run_model(model, **x)):
        np.testing.assert_allclose(found, x[f"x{number}"] @ matrices[f"w{number}"], atol=0.15 * (number + 1))

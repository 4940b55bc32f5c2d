"""4-bit blocks: how they lie in bytes, and that columns make good what the others cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from pastkey.export.quantize.rounding.blocks import join
from pastkey.export.quantize.rounding.int4_blocks import Gptq, dequantize

from ...plain_loop import onnxruntime

Array = npt.NDArray[Any]


def drawn(rows: int, columns: int, seed: int = 0) -> tuple[Array, Array]:
    """A matrix (N, K), and activations (T, K) whose channels go together and differ in size."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(columns, columns)) * random.lognormal(sigma=1, size=columns)
    activations = random.normal(size=(4 * columns, columns // 4)) @ mixing[: columns // 4]
    noise = 0.1 * random.normal(size=activations.shape)
    return random.normal(size=(rows, columns)).astype(np.float32), (activations + noise).astype(np.float32)


def nearest(matrix: Array, block_size: int) -> Array:
    """Each weight rounded by itself, over the whole range of its block."""
    blocks = matrix.reshape(len(matrix), -1, block_size)
    low, high = np.minimum(blocks.min(2), 0)[..., None], np.maximum(blocks.max(2), 0)[..., None]
    scale = (high - low) / 15
    zero = np.rint(-low / scale)
    numbers = np.clip(np.rint(blocks / scale) + zero, 0, 15)
    return ((numbers - zero) * scale).reshape(matrix.shape)


@pytest.mark.parametrize("block_size", [16, 32])
def test_products_on_text_err_by_less_than_half_of_what_the_nearest_numbers_cost(block_size):
    matrix, x = drawn(24, 96)
    found = dequantize(Gptq(x.T @ x).round(matrix, block_size).blocks)
    other = drawn(24, 96, seed=1)[1]

    def error(rounded: Array, rows: Array) -> float:
        return float(np.square(rows @ (rounded - matrix).T).sum())

    assert error(found, x) < 0.5 * error(nearest(matrix, block_size), x)
    # What is never read together in the text is not made good by one another.
    assert error(found, other) < 2 * error(nearest(matrix, block_size), other)


def test_activations_whose_squares_overflow_leave_each_weight_by_itself():
    matrix, _ = drawn(5, 64)
    hessians = [np.full((64, 64), np.inf, np.float32), np.eye(64, dtype=np.float32)]
    found, alone = (Gptq(hessian).round(matrix, 32).blocks for hessian in hessians)
    np.testing.assert_array_equal(dequantize(found), dequantize(alone))


@pytest.mark.parametrize(("rows", "columns", "block_size"), [(7, 50, 32), (5, 40, 16), (1, 16, 16), (3, 96, 32)])
def test_onnxruntime_multiplies_by_what_dequantize_says(rows, columns, block_size):
    """Also where a row is padded, and where a row's zero points end in half a byte."""
    matrix, x = drawn(rows, columns)
    found = Gptq(x.T @ x).round(matrix, block_size).blocks
    blocks = -(-columns // block_size)
    assert found.data.shape == (rows, blocks, block_size // 2)
    assert found.zeros.shape == (rows, -(-blocks // 2))
    scales = (found.scale_codes * found.row_scales).astype(np.float32)
    arrays = {"b": found.data, "s": scales, "z": found.zeros.reshape(-1)}
    node = onnx.helper.make_node(
        *("MatMulNBits", ["x", "b", "s", "z"], ["y"]),
        domain="com.microsoft",
        bits=4,
        block_size=found.block_size,
        K=columns,
        N=rows,
    )
    ends = [onnx.helper.make_tensor_value_info(name, 1, [None, size]) for name, size in (("x", columns), ("y", rows))]
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], weights)
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = x @ dequantize(found).T
    np.testing.assert_allclose(session.run(["y"], {"x": x})[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("number", [0.0, -3.5, 1e30, 1e-40])
def test_a_matrix_of_equal_numbers_is_exact(number):
    matrix = np.full((2, 40), number, np.float32)
    found = dequantize(Gptq(np.eye(40, dtype=np.float32)).round(matrix, 32).blocks)
    np.testing.assert_allclose(found, matrix, rtol=1e-5, atol=1e-37)


def test_channels_that_no_text_ever_reads_are_rounded_by_themselves():
    matrix, _ = drawn(4, 32)
    found = dequantize(Gptq(np.zeros((32, 32), np.float32)).round(matrix, 32).blocks)
    assert np.abs(found - matrix).max() <= (matrix.max(1) - matrix.min(1)).max() / 15


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_matrix_that_is_not_finite_is_refused(number):
    matrix = np.ones((2, 16), np.float32)
    matrix[1, 2] = number
    with pytest.raises(ValueError, match="NaN or infinity"):
        Gptq(np.eye(16, dtype=np.float32)).round(matrix, 16)


def test_matrices_below_one_another_are_one():
    parts = [Gptq(np.eye(48, dtype=np.float32)).round(drawn(rows, 48, rows)[0], 16).blocks for rows in (3, 5)]
    joined = join(parts)
    assert (joined.bits, joined.block_size) == (4, 16)
    np.testing.assert_array_equal(dequantize(joined), np.concatenate([dequantize(part) for part in parts]))


def test_the_error_is_that_of_the_products_on_the_text_and_of_damping_over_the_products():
    matrix, x = drawn(24, 96)
    hessian = x.T @ x
    blocks, error = Gptq(hessian).round(matrix, 32)
    wrong = (dequantize(blocks) - matrix).astype(np.float64)
    damped = hessian + 0.2 * hessian.diagonal().mean() * np.eye(96)
    cost, whole = (np.einsum("nk,kl,nl->", a, h, a) for a, h in ((wrong, damped), (matrix, hessian)))
    assert error == pytest.approx(cost / whole, rel=1e-4)


def test_a_layer_that_is_switched_off_has_no_error():
    matrix, x = drawn(24, 96)
    assert Gptq(np.zeros((96, 96), np.float32)).round(matrix, 32).error == 0
    assert Gptq(x.T @ x).round(0 * matrix, 32).error == 0

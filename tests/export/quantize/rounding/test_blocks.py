"""Matrices in int8 blocks: what a round trip costs, and the edges of the range."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pastkey.export.quantize.rounding.blocks import (
    choose_block_size,
    encode_scales,
    join,
    quantize_blocks,
    round_trip,
)
from pastkey.export.quantize.rounding.int4_blocks import Gptq
from pastkey.export.quantize.rounding.workers import for_each_part, one_thread_each

from ....oracles.dequantized import dequantize, dequantize_blocks
from ...plain_loop import onnxruntime

Array = npt.NDArray[Any]

MATRICES = st.tuples(st.integers(1, 5), st.integers(1, 70)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.floats(-(2.0**100), 2.0**100, width=32))
)


@given(MATRICES, st.sampled_from([16, 32]))
@settings(max_examples=200, deadline=None)
def test_a_round_trip_errs_by_half_a_step_at_most(matrix, block_size):
    quantized = quantize_blocks(matrix, block_size)
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    assert quantized.data.shape == (rows, blocks, block_size)
    assert quantized.scales.shape == (rows, blocks)
    assert (quantized.data.dtype.name, quantized.scales.dtype.name) == ("uint8", "float32")
    found = dequantize_blocks(quantized)
    assert found.shape == matrix.shape
    step = np.repeat(quantized.scales, block_size, axis=1)[:, :columns].astype(np.float64)
    # numbers below the smallest normal one may be stored as zero
    slack = np.maximum(step * 0.5001, np.finfo(np.float32).tiny * 127)
    assert (np.abs(found.astype(np.float64) - matrix) <= slack).all()


def test_zeros_are_stored_as_zeros():
    quantized = quantize_blocks(np.zeros((2, 40), np.float32), 32)
    assert (quantized.data == 128).all()
    assert (dequantize_blocks(quantized) == 0).all()
    assert np.isfinite(quantized.scales).all()


@pytest.mark.parametrize("number", [-3.5, 1e-30, 1e30])
def test_a_constant_block_is_exact(number):
    matrix = np.full((1, 32), number, np.float32)
    np.testing.assert_allclose(dequantize_blocks(quantize_blocks(matrix, 32)), matrix, rtol=1e-6)


def test_a_block_too_small_to_divide_by_becomes_zero():
    matrix = np.full((1, 32), 1e-40, np.float32)
    matrix[0, 0] = -1e-40
    quantized = quantize_blocks(matrix, 32)
    assert np.isfinite(quantized.scales).all()
    assert (np.abs(dequantize_blocks(quantized)) <= 1e-37).all()


def test_both_ends_of_the_range_are_used_and_padding_is_zero():
    matrix = np.array([[-2.0, 2.0, 1.0]], np.float32)
    quantized = quantize_blocks(matrix, 16)
    assert quantized.data[0, 0, :4].tolist() == [1, 255, 192, 128]
    assert (quantized.data[0, 0, 3:] == 128).all()
    assert quantized.scales[0, 0] == pytest.approx(2 / 127)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_is_refused(number):
    matrix = np.ones((2, 3), np.float32)
    matrix[1, 2] = number
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_blocks(matrix, 16)


@pytest.mark.parametrize(
    ("columns", "expected"), [(1, 16), (16, 16), (17, 32), (32, 32), (48, 16), (64, 32), (80, 16), (576, 32)]
)
def test_the_block_size_with_the_fewer_bytes_is_chosen(columns, expected):
    def stored(size: int) -> int:
        return -(-columns // size) * (size + 1)

    assert choose_block_size(columns) == expected
    assert stored(expected) <= min(stored(16), stored(32))


def test_scales_are_rounded_up_so_that_no_weight_is_cut_off():
    scales = np.random.default_rng(0).lognormal(size=(9, 7)).astype(np.float32)
    codes, row_scales = encode_scales(scales)
    assert (codes.dtype.name, codes.shape, row_scales.shape) == ("uint8", (9, 7), (9, 1))
    assert codes.min() >= 1
    assert (codes * row_scales >= scales * (1 - 1e-6)).all()
    nearest, _ = encode_scales(scales, np.rint)
    assert np.abs(nearest * row_scales - scales).max() <= np.abs(codes * row_scales - scales).max()
    assert (nearest < codes).any()


def test_joined_matrices_are_the_matrices_below_one_another():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(rows, 40)).astype(np.float32) for rows in (3, 1, 5)]
    quantized = [quantize_blocks(part, 32) for part in parts]
    joined = join(quantized)
    assert joined.columns == 40
    np.testing.assert_array_equal(
        dequantize_blocks(joined), np.concatenate([dequantize_blocks(one) for one in quantized])
    )


def at_once(matrix: Array, block_size: int) -> tuple[Array, Array, Array]:
    """Data, scale codes and row scales of the plain way: the whole matrix in each step."""
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    padded = np.zeros((rows, blocks * block_size), np.float32)
    padded[:, :columns] = matrix
    padded = padded.reshape(rows, blocks, block_size)
    codes, row_scales = encode_scales(np.abs(padded).max(2) / np.float32(127))
    scales = codes.astype(np.float32) * row_scales
    data = np.clip(np.rint(padded / scales[:, :, None]), -127, 127) + 128
    return data.astype(np.uint8), codes, row_scales


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("shape", "block_size"), [((1, 1), 16), ((64, 33), 32), ((200, 576), 32), ((129, 40), 16)])
def test_rows_by_rows_every_bit_is_that_of_the_whole_matrix(shape, block_size, transposed):
    matrix = (np.random.default_rng(0).standard_t(3, shape[:: -1 if transposed else 1]) * 0.02).astype(np.float32)
    matrix[0] *= 1e-40
    matrix = matrix.T if transposed else matrix
    found = quantize_blocks(matrix, block_size)
    for array, expected in zip(
        (found.data, found.scale_codes, found.row_scales), at_once(matrix, block_size), strict=True
    ):
        np.testing.assert_array_equal(array, expected)
    assert found.shape == found.data.shape
    np.testing.assert_array_equal(round_trip(matrix, block_size), dequantize_blocks(found))


# --- 4-bit blocks: how they lie in bytes, and that columns make good what the others cost -----------------------------


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
def test_a_matrix_that_is_not_finite_is_refused_of_int4_blocks(number):
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


# --- work on the rows of a matrix reaches each row once, and leaves torch's threads as they were ----------------------
@pytest.mark.parametrize("rows", [0, 1, 64, 65, 300])
def test_each_row_is_worked_on_once(rows):
    found = np.zeros(rows, int)

    def work(part: slice) -> None:
        found[part] += 1

    for_each_part(work, rows)
    assert found.tolist() == [1] * rows


def test_torch_has_one_thread_in_each_worker_and_its_own_number_after():
    before = torch.get_num_threads()
    with one_thread_each() as pool:
        assert set(pool.map(lambda _: torch.get_num_threads(), range(4))) == {1}
    assert torch.get_num_threads() == before


def test_what_a_worker_raises_is_raised():
    def work(part: slice) -> None:
        if part.start == 128:
            raise ValueError("NaN or infinity")

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="NaN or infinity"):
        for_each_part(work, 300)
    assert torch.get_num_threads() == before

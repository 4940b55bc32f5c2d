"""Matrices in int8 blocks: what a round trip costs, and the edges of the range."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pastkey.export.quantize.rounding.blocks import (
    choose_block_size,
    dequantize_blocks,
    encode_scales,
    join,
    quantize_blocks,
    round_trip,
)

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

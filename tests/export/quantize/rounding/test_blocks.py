"""Matrices in blocks of 8 and 4 bits: the error of a round trip, the edges of the range, and ONNX's own operators."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx.reference import ReferenceEvaluator

from pastkey.contract import names
from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.export import export
from pastkey.export.graph.blocks import Blocks
from pastkey.export.quantize.calibrate.activations import window_feeds
from pastkey.export.quantize.rounding import blocks
from pastkey.export.quantize.rounding.block_dequantize import dequantize_linear
from pastkey.export.quantize.rounding.blocks import encode_scales, quantize_blocks
from pastkey.export.quantize.rounding.int4_blocks import Gptq, round_to_nearest
from pastkey.export.quantize.rounding.workers import for_each_part, one_thread_each
from pastkey.runtime.engine.engine import Engine

from ....oracles.dequantized import dequantize
from ...decoders import Plain, llama
from ...small_graphs import Array, model_of, run_model

MATRICES = st.tuples(st.integers(1, 5), st.integers(1, 70)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.floats(-(2.0**100), 2.0**100, width=32))
)


@given(MATRICES, st.sampled_from([16, 32]))
@settings(max_examples=200, deadline=None)
def test_a_round_trip_errs_by_half_a_step_at_most(matrix, block_size):
    quantized = quantize_blocks(matrix, block_size)
    rows, columns = matrix.shape
    size = -(-columns // block_size)
    assert quantized.data.shape == (rows, size, block_size)
    assert quantized.scales.values.shape == (rows, size)
    assert (quantized.data.dtype.name, quantized.scales.values.dtype.name) == ("uint8", "float32")
    found = dequantize(quantized)
    assert found.shape == matrix.shape
    step = np.repeat(quantized.scales.values, block_size, axis=1)[:, :columns].astype(np.float64)
    # numbers below the smallest normal one may be stored as zero
    slack = np.maximum(step * 0.5001, np.finfo(np.float32).tiny * 127)
    assert (np.abs(found.astype(np.float64) - matrix) <= slack).all()


def in_4_bits(matrix: Array, block_size: int) -> Blocks:
    return Gptq(np.eye(matrix.shape[1], dtype=np.float32)).round(matrix, block_size).blocks


each_width = pytest.mark.parametrize("rounded", [quantize_blocks, in_4_bits])


@each_width
@pytest.mark.parametrize("number", [0.0, -3.5, 1e-30, 1e30, 1e-40])
def test_a_matrix_of_equal_numbers_is_exact(rounded, number):
    """But for numbers too small to divide by, which become zero."""
    matrix = np.full((2, 40), number, np.float32)
    found = rounded(matrix, 32)
    assert np.isfinite(found.scales.values).all()
    np.testing.assert_allclose(dequantize(found), matrix, rtol=1e-5, atol=1e-37)


@each_width
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_is_refused(rounded, number):
    matrix = np.ones((2, 16), np.float32)
    matrix[1, 2] = number
    with pytest.raises(ValueError, match="NaN or infinity"):
        rounded(matrix, 16)


@each_width
def test_joined_matrices_are_the_matrices_below_one_another(rounded):
    rng = np.random.default_rng(0)
    parts = [rounded(rng.normal(size=(rows, 40)).astype(np.float32), 32) for rows in (3, 1, 5)]
    joined = blocks.join(parts)
    assert (joined.columns, joined.bits, joined.block_size) == (40, parts[0].bits, 32)
    np.testing.assert_array_equal(dequantize(joined), np.concatenate([dequantize(part) for part in parts]))


def test_both_ends_of_the_range_are_used_and_padding_is_zero():
    matrix = np.array([[-2.0, 2.0, 1.0]], np.float32)
    quantized = quantize_blocks(matrix, 16)
    assert quantized.data[0, 0, :4].tolist() == [1, 255, 192, 128]
    assert (quantized.data[0, 0, 3:] == 128).all()
    assert quantized.scales.values[0, 0] == pytest.approx(2 / 127)


@pytest.mark.parametrize(
    ("columns", "expected"), [(1, 16), (16, 16), (17, 32), (32, 32), (48, 16), (64, 32), (80, 16), (576, 32)]
)
def test_the_block_size_with_the_fewer_bytes_is_chosen(columns, expected):
    def stored(size: int) -> int:
        return -(-columns // size) * (size + 1)

    assert blocks.choose_block_size(columns) == expected
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


def at_once(matrix: Array, block_size: int) -> tuple[Array, Array, Array]:
    """Data, scale codes and row scales of the plain way: the whole matrix in each step."""
    padded = np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % block_size)))
    padded = padded.reshape(len(matrix), -1, block_size)
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
    arrays = found.data, found.scales.codes, found.scales.factors
    for array, expected in zip(arrays, at_once(matrix, block_size), strict=True):
        np.testing.assert_array_equal(array, expected)
    assert found.shape == found.data.shape
    np.testing.assert_array_equal(blocks.round_trip(matrix, block_size), dequantize(found))


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
    found = Gptq(np.full((64, 64), np.inf, np.float32)).round(matrix, 32).blocks
    np.testing.assert_array_equal(dequantize(found), dequantize(in_4_bits(matrix, 32)))


@pytest.mark.parametrize(("rows", "columns", "block_size"), [(7, 50, 32), (5, 40, 16), (1, 16, 16), (3, 96, 32)])
def test_onnxruntime_multiplies_by_what_dequantize_says(rows, columns, block_size):
    """Also where a row is padded, and where a row's zero points end in half a byte."""
    matrix, x = drawn(rows, columns)
    found = Gptq(x.T @ x).round(matrix, block_size).blocks
    size = -(-columns // block_size)
    assert found.data.shape == (rows, size, block_size // 2)
    assert found.zeros.shape == (rows, -(-size // 2))
    sizes = f"<K: int = {columns}, N: int = {rows}, bits: int = 4, block_size: int = {block_size}>"
    inputs = f"float[T,{columns}] x, uint8[{rows},{size},{block_size // 2}] b, float[{rows},{size}] s, uint8[Z] z"
    model = model_of(
        f"g ({inputs}) => (float[T,{rows}] y) {{ y = com.microsoft.MatMulNBits {sizes} (x, b, s, z) }}",
        b=found.data,
        s=found.scales.values,
        z=found.zeros.reshape(-1),
    )
    expected = x @ dequantize(found).T
    np.testing.assert_allclose(run_model(model, x=x)[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_channels_that_no_text_ever_reads_are_rounded_by_themselves_and_lose_nothing():
    matrix, _ = drawn(4, 32)
    rounded, error = Gptq(np.zeros((32, 32), np.float32)).round(matrix, 32)
    assert np.abs(dequantize(rounded) - matrix).max() <= (matrix.max(1) - matrix.min(1)).max() / 15
    assert error == Gptq(np.eye(32, dtype=np.float32)).round(0 * matrix, 32).error == 0


def test_the_error_is_that_of_the_products_on_the_text_and_of_damping_over_the_products():
    matrix, x = drawn(24, 96)
    hessian = x.T @ x
    rounded, error = Gptq(hessian).round(matrix, 32)
    wrong = (dequantize(rounded) - matrix).astype(np.float64)
    damped = hessian + 0.2 * hessian.diagonal().mean() * np.eye(96)
    cost, whole = (np.einsum("nk,kl,nl->", a, h, a) for a, h in ((wrong, damped), (matrix, hessian)))
    assert error == pytest.approx(cost / whole, rel=1e-4)


# --- work on the rows of a matrix reaches each row once, and leaves torch's threads as they were ----------------------
@pytest.mark.parametrize("rows", [0, 1, 64, 65, 300])
def test_each_row_is_worked_on_once(rows):
    found = np.zeros(rows, int)

    def work(part: slice) -> None:
        found[part] += 1

    for_each_part(work, rows)
    assert found.tolist() == [1] * rows


def test_torch_has_one_thread_in_each_worker_and_its_own_number_after_also_where_one_raises():
    def work(part: slice) -> None:
        if part.start == 128:
            raise ValueError("NaN or infinity")

    before = torch.get_num_threads()
    with one_thread_each() as pool:
        assert set(pool.map(lambda _: torch.get_num_threads(), range(4))) == {1}
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="NaN or infinity"):
        for_each_part(work, 300)
    assert torch.get_num_threads() == before


# --- portable bundles multiply by ONNX's own operators, and compute what MatMulNBits does -----------------------------
IDS = np.arange(12) % 7


@pytest.mark.parametrize("columns", [32, 33, 48, 7])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_operator_gives_the_matrix_transposed(columns, bits):
    matrix = np.random.default_rng(0).normal(size=(6, columns)).astype(np.float32)
    blocks = quantize_blocks(matrix, 16) if bits == 8 else round_to_nearest(matrix, 16)
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="weights"), ir_version=10)
    node = dequantize_linear(model, "w", blocks)
    model.graph.append(node)
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(node.outputs[0])
    (found,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {})
    np.testing.assert_array_equal(found[:columns], dequantize(blocks).T)
    assert found.shape == (-(-columns // 16) * 16, 6)
    assert not found[columns:].any()


def reference_logits(bundle: Bundle, ids: np.ndarray) -> np.ndarray:
    """(T, V), by onnx's own evaluator of the operators' definitions, from an empty cache."""
    model = ir.load(bundle.all_logits_graph)
    feeds = window_feeds({value.name: value.shape for value in model.graph.inputs}, ids)
    return ReferenceEvaluator(onnx.load(bundle.all_logits_graph)).run([names.LOGITS], feeds)[0][0]


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
        assert sum(node.op_type == "DequantizeLinear" for node in model.graph.node) >= 3
    # The definition multiplies activations in float32, where the kernels read them in int8.
    off = np.abs(reference_logits(bundle, IDS) - logits["portable"]).max() / np.abs(logits["portable"]).max()
    assert off < 0.03

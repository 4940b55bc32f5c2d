"""int8 in blocks: the arrays, the graph, and what it costs in bytes and in exactness."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pastkey.config import ModelConfig
from pastkey.errors import InputError
from pastkey.export import export
from pastkey.export.blocks import choose_block_size, dequantize_blocks, quantize_blocks
from pastkey.export.evaluate import kl_divergence
from pastkey.export.quantize import quantize
from pastkey.train.settings import PRESETS

from .conftest import Export, Exported
from .decoders import drawn
from .plain_loop import onnxruntime, run_chunks

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


# --- whole decoders -----------------------------------------------------------------------------------------------
def float_matrices(model: onnx.ModelProto) -> list[str]:
    """Initializers in float32 that have two axes and more than a handful of elements, but for factors of scales."""
    return [
        t.name
        for t in model.graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT
        and len(t.dims) >= 2
        and np.prod(t.dims) > 16
        and not (t.name.startswith("scales_of_") and t.name.endswith(".factors"))
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_matrix_is_left_in_float(name: str, exported: Export) -> None:
    made = exported(name, "int8")
    for last in (False, True):
        assert float_matrices(made.graph(last=last)) == []
    assert float_matrices(exported(name).graph()) != []
    operators = made.bundle.manifest.operators
    assert not {"MatMul", "Gemm"} & set(operators)
    linear = sum(p.dim() == 2 for p in made.module.parameters())
    tables = 1 if name == "llama" else 2  # tokens, and learned positions
    assert operators["Gather"] == 2 * tables  # blocks and scales
    # A tied matrix is both; in each of two layers q, k and v are one, and gate and up.
    assert operators["MatMulNBits"] == (linear - tables + 1 - 2 * 3 if name == "llama" else linear - tables - 2 * 2)


def test_products_run_on_int8_activations(exported: Export) -> None:
    for node in exported("llama", "int8").graph().graph.node:
        if node.op_type == "MatMulNBits":
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert (attributes["bits"], attributes["accuracy_level"]) == (8, 4)
            assert attributes["block_size"] in (16, 32, 64)


def scales_of(model: ir.Model) -> dict[str, Array]:
    """Matrix -> its scales (N, blocks), as the graph computes them."""
    found: dict[str, Array] = {}
    gathered = ""
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            found[str(node.inputs[1].name).removesuffix(".blocks")] = computed(node.inputs[2])
        elif node.op_type == "Gather" and node.inputs[0].const_value is not None:
            gathered = str(node.inputs[0].name).removesuffix(".table")
        elif node.op_type == "Gather" and node.inputs[0].producer().op_type in ("Mul", "Split"):
            found[gathered] = computed(node.inputs[0])  # stands behind the gathered blocks
    return found


def computed(scales: ir.Value) -> Array:
    """Cast(codes) * factors, or the part of it that a Split gives."""
    maker, rows = scales.producer(), slice(None)
    if maker.op_type == "Split":
        ends = maker.inputs[1].const_value.numpy().cumsum()
        rows = slice(*[0, *ends][scales.index() : scales.index() + 2])
        maker = maker.inputs[0].producer()
    codes, factors = maker.inputs[0].producer().inputs[0], maker.inputs[1]
    whole: Array = codes.const_value.numpy() * factors.const_value.numpy()
    return whole[rows]


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


@dataclass(frozen=True)
class Uncalibrated:
    """A decoder's int8 graph whose scales were left where they are, and the graph's weights."""

    path: Path
    weights: dict[str, Array]
    scales: dict[str, Array]


def uncalibrated(made: Exported, folder: Path) -> Uncalibrated:
    model = ir.load(made.bundle.common_graph)
    quantize(model)
    path = folder / "int8.onnx"
    ir.save(model, path)
    weights = {v.name: v.const_value.numpy() for v in model.graph.initializers.values()}
    return Uncalibrated(path, weights, scales_of(model))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_stored_blocks_are_the_modules_weights(name: str, exported: Export, tmp_path: Path) -> None:
    made = exported(name)
    int8 = uncalibrated(made, inside(made, tmp_path))
    weights = int8.weights
    known = dict(made.module.named_parameters())
    blocks = [key for key in weights if key.endswith(".blocks")]
    assert len(blocks) >= 9
    for key in blocks:
        plain = key.removesuffix(".blocks")
        data, scales = weights[key], int8.scales[plain]
        parameter = np.concatenate([known[part].detach().numpy() for part in plain.split("+")])
        values = ((data.astype(np.float32) - 128) * scales[..., None]).reshape(len(data), -1)
        found = values[:, : parameter.shape[1]]
        step = np.repeat(scales, data.shape[2], axis=1)[:, : parameter.shape[1]]
        assert (np.abs(found - parameter) <= 0.5001 * step).all()


def inside(made: Exported, folder: Path) -> Path:
    """A folder with the weights file that the float32 graph names."""
    for file in made.bundle.common_graph.parent.glob("*_data"):
        shutil.copy(file, folder)
    return folder


def exact_products(path: Path) -> Path:
    """The int8 graph with its weights computed in float32: accuracy level 1 leaves activations alone."""
    model = onnx.load(path)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    exact = path.with_name("exact.onnx")
    onnx.save(model, exact)
    return exact


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_int8_graph_is_the_dequantized_model_but_for_its_activations(
    name: str, exported: Export, tmp_path: Path
) -> None:
    import torch

    made = exported(name)
    int8 = uncalibrated(made, inside(made, tmp_path))
    dequantized = {}
    for key, parameter in made.module.named_parameters():
        joined = next((k for k in int8.weights if key in k.split(".blocks")[0].split(".table")[0].split("+")), None)
        if joined is not None and parameter.dim() == 2:
            name = joined.rsplit(".", 1)[0]
            data = int8.weights.get(f"{name}.blocks", int8.weights.get(f"{name}.table"))
            assert data is not None
            values = (data.astype(np.float32) - 128) * int8.scales[name][..., None]
            before = name.split("+")[: name.split("+").index(key)]
            first = sum(len(made.module.get_parameter(part)) for part in before)
            rows = values.reshape(len(data), -1)[first : first + len(parameter)]
            dequantized[key] = rows[:, : parameter.shape[1]]
    assert len(dequantized) == sum(p.dim() == 2 for p in made.module.parameters())
    ids = RNG.integers(0, 61, 40).tolist()
    with torch.no_grad():
        kept = {key: p.clone() for key, p in made.module.named_parameters()}
        try:
            for key, array in dequantized.items():
                made.module.get_parameter(key).copy_(torch.from_numpy(array))
            expected = made.torch_logits(ids)
        finally:
            for key, tensor in kept.items():
                made.module.get_parameter(key).copy_(tensor)
    exact = run_chunks(exact_products(int8.path), [ids])
    np.testing.assert_allclose(exact, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    shipped = run_chunks(int8.path, [ids])
    assert 0 < np.abs(shipped - expected).max() <= 0.05 * np.abs(expected).max()
    assert kl_divergence(expected, shipped) < 0.02


def test_small_decoders_shrink_to_a_third_at_most(exported: Export) -> None:
    for name in ("llama", "gpt2"):
        report = exported(name, "int8").report
        assert report.fp32_weight_bytes == exported(name).report.weight_bytes
        assert report.weight_bytes <= 0.33 * report.fp32_weight_bytes


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("preset", ["gpt2", "llama"])
def test_int8_takes_at_most_0_29_of_float32_from_three_million_parameters(
    preset: str, tied: bool, tmp_path: Path
) -> None:
    sizes = {"vocab_size": 2003, "hidden_size": 288, "intermediate_size": 800, "tie_word_embeddings": tied}
    module = drawn(ModelConfig(**(dict(PRESETS[preset].model) | sizes)))
    assert sum(p.numel() for p in module.parameters()) >= 3_000_000
    report = export(module, tmp_path / "bundle", context_length=module.config.max_position_embeddings)
    assert report.verification.ok
    assert report.weight_bytes / report.fp32_weight_bytes <= 0.29
    stored = sum(path.stat().st_size for path in (tmp_path / "bundle" / "onnx").iterdir())
    assert stored / report.fp32_weight_bytes <= 0.3  # both graphs included

"""int8 of a graph's MatMuls and embeddings, by rules 1 to 5."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.errors import InputError
from pastkey.export.graph.blocks import Blocks, Numbers, packed
from pastkey.export.quantize.rounding import matrices
from pastkey.export.quantize.rounding.blocks import quantize_blocks
from pastkey.export.quantize.rounding.merge import find_mergeable
from pastkey.export.quantize.rounding.rewrite import quantize
from pastkey.providers import Form

from ....oracles.dequantized import dequantize
from ...blocks import scales_of
from ...small_graphs import Array, model_of, run_model

SCALES = ["Cast", "Mul"]  # of bytes, folded at load
GATHERED = ["Gather", "Cast", "Sub", "Gather", "Unsqueeze", "Mul", "Shape", "Concat", "Reshape"]  # of a quantized table


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


PRODUCTS: dict[str, dict[str, Array]] = {
    "y = MatMul(x, w)": {"w": W},
    "t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t)": {"w": np.ascontiguousarray(W.T)},
    "y = Gemm(x, w)": {"w": W},
    "y = Gemm(x, w, b)": {"w": W, "b": BIAS},
    "y = Gemm <transB = 1> (x, w, b)": {"w": np.ascontiguousarray(W.T), "b": BIAS},
}


@pytest.mark.parametrize("body", PRODUCTS)
def test_every_form_of_a_product_is_quantized(body):
    weights = PRODUCTS[body]
    model, expected = graph_of(body, **weights), X @ W + weights.get("b", 0)
    if weights["w"].shape[0] == 23:  # x has K columns whichever axis order the weight has
        model.graph.inputs[0].shape = ir.Shape([2, 50])
    quantize(model)
    operators = [node.op_type for node in model.graph]
    assert operators[:3] == [*SCALES, "MatMulNBits"]
    assert set(operators[3:]) <= {"Add"}
    stored = {v.name: v.const_value.numpy() for v in model.graph.initializers.values()}
    assert {name: (a.dtype.name, a.shape) for name, a in stored.items() if name != "b"} == {
        "w.blocks": ("uint8", (23, 2, 32)),
        "scales_of_2_0_0.scale_codes": ("uint8", (23, 2)),
        "scales_of_2_0_0.row_scales": ("float32", (23, 1)),
    }
    # a dot product of 50 terms, each wrong by half a step of the weights and of the activations
    np.testing.assert_allclose(run(model, X), expected, atol=0.15)


def test_a_gathered_table_is_quantized_and_cut_to_its_width():
    table = RNG.normal(size=(5, 50)).astype(np.float32)
    model = graph_of("y = Gather(w, i)", w=table)
    quantize(model)
    assert [node.op_type for node in model.graph] == [*SCALES, *GATHERED, "Slice"]
    expected = dequantize(quantize_blocks(table, 32))[[3, 0]]
    np.testing.assert_array_equal(run(model, X[:, :5]), expected)


def test_a_tied_table_is_stored_once_for_both_uses_or_kept_for_both():
    table = RNG.normal(size=(5, 48)).astype(np.float32)
    kept, model = (
        graph_of("e = Gather(w, i) t = Transpose <perm = [1, 0]> (w) y = MatMul(e, t)", w=table) for _ in range(2)
    )
    quantize(kept, {"w"})
    assert [node.op_type for node in kept.graph] == ["Gather", "Transpose", "MatMul"]
    quantize(model)
    data = {v.name: v.const_value.numpy() for v in model.graph.initializers.values()}
    scales = {"scales_of_3_0_0.scale_codes", "scales_of_3_0_0.row_scales"}
    assert {name for name in data if data[name].size > 4} == {"w.blocks", "w.table"} | scales
    np.testing.assert_array_equal(data["w.table"], data["w.blocks"])  # the weights file holds equal content once
    assert [node.op_type for node in model.graph] == [*SCALES, *GATHERED, "MatMulNBits"]


def error_of_product(output: str, columns: int) -> float:
    """RMS error of int8 activations (1, 2, columns) times an int8 matrix, over the RMS of the product."""
    rng = np.random.default_rng(1)
    matrix, x = (rng.normal(size=shape).astype(np.float32) for shape in ((columns, 40), (1, 2, columns)))
    model = graph_of(f"{output} = MatMul(x, w)", output, "1,2", w=matrix)
    quantize(model)
    blocks = model.graph.initializers["w.blocks"].const_value
    dequantized = (blocks.numpy().astype(np.float32) - 128) * scales_of(model)["w"][..., None]
    exact = x @ dequantized.reshape(40, -1)[:, :columns].T
    return float(np.sqrt(np.square(run(model, x) - exact).mean() / np.square(exact).mean()))


@pytest.mark.parametrize("columns", [64, 60], ids=["whole_blocks", "padded"])
def test_the_output_head_reads_what_int8_left_of_its_input_too(columns):
    assert error_of_product("logits", columns) < error_of_product("y", columns) / 50


def test_what_has_no_quantized_form_is_left_alone():
    for body in (
        "t = Transpose <perm = [1, 0]> (x) y = MatMul(t, x)",
        "y = Gemm <alpha = 2.0> (x, w)",
        "t = Transpose <perm = [1, 0]> (x) y = Gemm <transA = 1> (t, w)",
    ):
        model = graph_of(body, w=W)
        quantize(model)
        assert "MatMulNBits" not in {node.op_type for node in model.graph}, body


def test_a_weight_that_is_not_finite_is_named():
    broken = W.copy()
    broken[3, 3] = np.nan
    with pytest.raises(InputError, match="the weight w holds NaN or infinity, which cannot be quantized"):
        quantize(graph_of("y = MatMul(x, w)", w=broken))


def test_scales_of_many_matrices_are_computed_together_and_each_gets_its_own():
    """In several steps, since the sizes are in the graph itself."""
    weights = {f"w{i}": RNG.normal(size=(50, 3 + i % 4)).astype(np.float32) * (i + 1) for i in range(70)}
    body = " ".join(f"a{i} = MatMul(x{i}, w{i})" for i in range(70))
    inputs = ", ".join([f"float[2,50] x{i}" for i in range(70)] + [f"float[50,{3 + i % 4}] w{i}" for i in range(70)])
    outputs = ", ".join(f"float[2,{3 + i % 4}] a{i}" for i in range(70))
    model = model_of(f"g ({inputs}) => ({outputs}) {{ {body} }}", **weights)
    quantize(model)
    assert Counter(node.op_type for node in model.graph) == {"MatMulNBits": 70, "Cast": 3, "Mul": 3, "Split": 3}
    for name, scales in scales_of(model).items():
        np.testing.assert_array_equal(scales, quantize_blocks(weights[name].T, 32).scales.values)
    x = {f"x{i}": RNG.normal(size=(2, 50)).astype(np.float32) for i in range(70)}
    for number, found in enumerate(run_model(model, **x)):
        np.testing.assert_allclose(found, x[f"x{number}"] @ weights[f"w{number}"], atol=0.25 * (number + 1))


# --- merged projections: which MatMuls become one, and that they compute what each of them did ------------------------
W_OF_MERGE, V = (RNG.normal(size=(50, columns)).astype(np.float32) for columns in (23, 9))


def two_products(outputs: str, nodes: str) -> ir.Model:
    weights = "float[50,23] w, float[50,9] v"
    return model_of(f"g (float[2,50] x, {weights}) => ({outputs}) {{ {nodes} }}", w=W_OF_MERGE, v=V)


def matmuls(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "MatMul"]


def test_products_that_read_one_activation_become_one():
    nodes = "a = MatMul(x, w) b = MatMul(x, v) c = Sigmoid(b) y = Concat <axis = 1> (a, c)"
    model = two_products("float[2,N] y", nodes)
    quantize(model)
    operators = ["Cast", "Mul", "MatMulNBits", "Split", "Sigmoid", "Concat"]
    assert Counter(node.op_type for node in model.graph) == Counter(operators)
    expected = np.concatenate([X @ W_OF_MERGE, 1 / (1 + np.exp(-X @ V))], axis=1)
    np.testing.assert_allclose(run_model(model, x=X)[0], expected, atol=0.15)


def test_products_of_different_activations_stay_apart():
    model = two_products("float[2,23] a, float[2,9] b", "z = Neg(x) a = MatMul(x, w) b = MatMul(z, v)")
    assert find_mergeable(matmuls(model)) == []


ATTENTION = "com.microsoft.GroupQueryAttention <num_heads: int = 2, kv_num_heads: int = 1>"
TEXT = (
    "g (float[1,T,8] x, float[8,16] wq, float[8,8] wk, float[8,8] wv, float[16] bq, float[8] bk, float[8] bv,"
    " float[1,1,P,8] past_k, float[1,1,P,8] past_v, int32[1] seqlens, int32[1] total) => (float[1,T,16] y)"
    " {{ {} y, pk, pv = {} (q, k, v, past_k, past_v, seqlens, total) }}"
)
WEIGHTS: dict[str, Array] = {
    name: RNG.normal(size=shape).astype(np.float32)
    for name, shape in (("wq", (8, 16)), ("wk", (8, 8)), ("wv", (8, 8)), ("bq", (16,)), ("bk", (8,)), ("bv", (8,)))
}
PLAIN = "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)"
BIASED = "q0 = MatMul(x, wq) q = Add(q0, bq) k0 = MatMul(x, wk) k = Add(k0, bk) v0 = MatMul(x, wv) v = Add(v0, bv)"


def test_queries_keys_and_values_are_one_where_the_operator_can_take_them_so():
    for body, qkv in (
        (PLAIN, True),
        (BIASED, True),
        ("q0 = MatMul(x, wq) q = Add(q0, bq) k = MatMul(x, wk) v = MatMul(x, wv)", False),
        ("q = MatMul(x, wq) k0 = MatMul(x, wk) k = Neg(k0) v = MatMul(x, wv)", False),
        (f"{PLAIN} z = Neg(v)", False),
    ):
        (projections,) = find_mergeable(matmuls(model_of(TEXT.format(body, ATTENTION), **WEIGHTS)))
        assert (projections.attention is not None) == qkv, body
        assert [str(node.inputs[1].name) for node in projections.matmuls] == ["wq", "wk", "wv"]


@pytest.mark.parametrize("body", [PLAIN, BIASED], ids=["plain", "biases"])
def test_attention_over_merged_projections_is_the_same(body):
    x = RNG.normal(size=(1, 5, 8)).astype(np.float32)
    feeds = {"x": x, "past_k": np.zeros((1, 1, 0, 8), np.float32), "past_v": np.zeros((1, 1, 0, 8), np.float32)}
    feeds |= {"seqlens": np.array([4], np.int32), "total": np.array([5], np.int32)}
    (expected,) = run_model(model_of(TEXT.format(body, ATTENTION), **WEIGHTS), **feeds)
    model = model_of(TEXT.format(body, ATTENTION), **WEIGHTS)
    quantize(model)
    (attention,) = (node for node in model.graph if node.op_type == "GroupQueryAttention")
    assert attention.inputs[1] is attention.inputs[2] is None
    np.testing.assert_allclose(run_model(model, **feeds)[0], expected, atol=0.3)


# --- matrices are found in a graph, with their shapes, without being read ---------------------------------------------
def unread():
    raise AssertionError("a matrix was read for its shape")


@pytest.mark.parametrize("body", [*PRODUCTS, "y = Gemm <alpha = 2.0> (x, w)", "y = Add(x, w)", "y = Gather(w, i)"])
def test_a_matrix_is_found_unread(body):
    weights = PRODUCTS.get(body, {"w": W})
    model = graph_of(body, **weights)
    value = model.graph.initializers["w"]
    value.const_value = matrices.lazy("w", ir.DataType.FLOAT, weights["w"].shape, unread)
    reads = [read for node in model.graph if (read := matrices.matmul_weight(node)) is not None]
    assert [read.shape for read in reads] == ([(23, 50)] if body in PRODUCTS else [])
    gathered = [found for node in model.graph if (found := matrices.embedding_weight(node)) is not None]
    assert gathered == ([value] if "Gather" in body else [])
    assert matrices.shape_of(value) == weights["w"].shape
    assert matrices.shape_of(model.graph.outputs[0]) is matrices.shape_of(None) is None


def test_a_lazy_weight_is_made_each_time_that_it_is_read():
    model = model_of("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    made = []

    def make():
        made.append(1)
        return np.arange(6, dtype=np.uint8).reshape(2, 3)

    value = matrices.add_lazy_weight(model, "w", ir.DataType.UINT8, (2, 3), make)
    assert (value.const_value.nbytes, value.const_value.dtype, made) == (6, ir.DataType.UINT8, [])
    for times in (1, 2):
        np.testing.assert_array_equal(value.const_value.numpy(), [[0, 1, 2], [3, 4, 5]])
        assert len(made) == times


# --- blocks of a source --------------------------------------------------------------------------------------------
def some_blocks(bits: int, size: int, what: str) -> Blocks:
    """24 rows of 64 columns, as a source may have them."""
    rng, count = np.random.default_rng(2), 64 // size
    numbers = rng.integers(0, 32 if "offsets" in what else 1 << bits, (24, count, size), np.uint8) & ((1 << bits) - 1)
    data = packed(numbers) if bits == 4 else numbers
    scales = Numbers(rng.uniform(0.5, 1, (24, count)).astype(np.float16 if "half" in what else np.float32) / 64)
    if "codes" in what:
        scales = Numbers(
            rng.uniform(0.5, 1, (24, 1)).astype(np.float32) / 64, rng.integers(1, 64, (24, count), np.uint8)
        )
    zeros = rng.integers(0, 1 << bits, (24, count), np.uint8) if "zeros" in what else None
    offsets = Numbers(rng.uniform(0, 1, (24, count)).astype(np.float16)) if "offsets" in what else None
    order = rng.permutation(64) if "order" in what else None
    zeros = packed(zeros) if zeros is not None and bits == 4 else zeros
    return Blocks(lambda: data, scales, 64, size, zeros, bits, offsets, order)


@pytest.mark.parametrize("what", ["half", "codes, offsets"])
def test_rows_of_four_bits_are_gathered(what):
    blocks = some_blocks(4, 32, what)
    model = graph_of("y = Gather(w, i)", w=blocks.matrix)
    quantize(model, blocks={"w": blocks})
    np.testing.assert_array_equal(run(model, np.zeros((2, 24), np.float32)), blocks.matrix[[3, 0]])


@pytest.mark.parametrize("form", [Form.MATMUL_NBITS, Form.DEQUANTIZE_LINEAR])
@pytest.mark.parametrize(
    ("bits", "size", "what"),
    [(8, 32, "zeros"), (8, 16, "codes"), (4, 32, "half"), (4, 16, ""), (4, 32, "zeros, order"), (4, 32, "offsets"),
     (8, 32, "codes, offsets")],
)  # fmt: skip
def test_blocks_of_a_source_are_multiplied_as_they_are(bits, size, what, form):
    if "offsets" in what and form is Form.DEQUANTIZE_LINEAR:
        pytest.skip("their targets round them to int8")
    blocks, x = some_blocks(bits, size, what), RNG.normal(size=(1, 2, 64)).astype(np.float32)
    matrix = blocks.matrix if blocks.order is None else blocks.matrix[:, np.argsort(blocks.order)]
    model = graph_of("y = MatMul(x, w)", "y", "1,2", w=np.ascontiguousarray(matrix.T))
    quantize(model, blocks={"w": blocks}, form=form)
    expected = x @ matrix.T
    np.testing.assert_allclose(run(model, x), expected, atol=0.02 * np.abs(expected).max())  # of int8 activations

"""Merged projections: which MatMuls become one, and that they compute what each of them did."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.export.quantize.rounding.merge import find_mergeable
from pastkey.export.quantize.rounding.rewrite import quantize

from ...small_graphs import Array, model_of, run_model

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 50)).astype(np.float32)
W, V = (RNG.normal(size=(50, columns)).astype(np.float32) for columns in (23, 9))


def matmuls(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "MatMul"]


# --- rule 2 -------------------------------------------------------------------------------------------------------
def test_products_that_read_one_activation_become_one():
    model = model_of(
        "g (float[2,50] x, float[50,23] w, float[50,9] v) => (float[2,N] y)"
        " { a = MatMul(x, w) b = MatMul(x, v) c = Sigmoid(b) y = Concat <axis = 1> (a, c) }",
        w=W, v=V,
    )  # fmt: skip
    quantize(model)
    operators = ["Cast", "Mul", "MatMulNBits", "Split", "Sigmoid", "Concat"]
    assert Counter(node.op_type for node in model.graph) == Counter(operators)
    expected = np.concatenate([X @ W, 1 / (1 + np.exp(-X @ V))], axis=1)
    np.testing.assert_allclose(run_model(model, x=X)[0], expected, atol=0.15)


def test_products_of_different_activations_stay_apart():
    model = model_of(
        "g (float[2,50] x, float[50,23] w, float[50,9] v) => (float[2,23] a, float[2,9] b)"
        " { z = Neg(x) a = MatMul(x, w) b = MatMul(z, v) }",
        w=W, v=V,
    )  # fmt: skip
    assert find_mergeable(matmuls(model)) == []


# --- rule 1 -------------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize(
    ("body", "qkv"),
    [
        (PLAIN, True),
        (BIASED, True),
        ("q0 = MatMul(x, wq) q = Add(q0, bq) k = MatMul(x, wk) v = MatMul(x, wv)", False),
        ("q = MatMul(x, wq) k0 = MatMul(x, wk) k = Neg(k0) v = MatMul(x, wv)", False),
        (f"{PLAIN} z = Neg(v)", False),
    ],
    ids=["plain", "biases", "one_bias", "keys_changed", "values_read_elsewhere"],
)
def test_queries_keys_and_values_are_one_where_the_operator_can_take_them_so(body, qkv):
    model = model_of(TEXT.format(body, ATTENTION), **WEIGHTS)
    (projections,) = find_mergeable(matmuls(model))
    assert (projections.attention is not None) == qkv
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
    np.testing.assert_allclose(run_model(model, **feeds)[0], expected, atol=0.1)

"""Weights, activations and cache in float16; values that do not fit into it stay in float32."""

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.contract import names
from pastkey.export.graph.float16 import to_float16

from ..small_graphs import model_of, run_model

RNG = np.random.default_rng(0)


def halved(text, **weights):
    model = model_of(text, **weights)
    to_float16(model)
    return model


def test_weights_and_inputs_are_float16_and_logits_float32():
    w = RNG.normal(size=(8, 5)).astype(np.float32)
    x = RNG.normal(size=(2, 8)).astype(np.float16)
    model = halved("g (float[2,8] x, float[8,5] w) => (float[2,5] logits, float[2,5] y) { y = MatMul(x, w) "
                   "logits = Neg(y) }", w=w)  # fmt: skip
    logits, y = run_model(model, x=x)
    assert (logits.dtype.name, y.dtype.name) == ("float32", "float16")
    assert [value.dtype for value in model.graph.inputs] == [ir.DataType.FLOAT16]
    assert [value.dtype for value in model.graph.initializers.values()] == [ir.DataType.FLOAT16]
    np.testing.assert_allclose(logits, -(x.astype(np.float32) @ w), rtol=0, atol=1e-2)


def test_angles_of_late_positions_are_exact():
    text = """g (int64[1,3] p, float[1,4] f) => (float[1,3,4] y) {
        one = Constant <value_ints = [-1]> () q = Unsqueeze(p, one) r = Cast <to = 1> (q) a = Mul(r, f) y = Cos(a) }"""
    frequencies = np.array([[1.0, 0.3, 0.1, 0.01]], np.float32)
    positions = np.array([[2049, 30001, 65521]])  # none of which float16 has
    (found,) = run_model(halved(text, f=frequencies), p=positions)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, np.cos(positions[..., None] * frequencies), rtol=0, atol=2e-3)


ROOTS = {
    "a root": "nothing = Constant <value_float = 0.0> () f = Add(e, nothing) r = Sqrt(f) i = Reciprocal(r)",
    "a power": "i = Pow(e, power)",
}


@pytest.mark.parametrize("name", ROOTS)
def test_squares_of_a_norm_do_not_overflow(name):
    text = f"""g (float[1,4] x, float two, float small, float power) => (float[1,4] y) {{
        axis = Constant <value_ints = [-1]> ()
        s = Pow(x, two) m = ReduceMean(s, axis) e = Add(m, small) {ROOTS[name]} y = Mul(x, i) }}"""
    model = halved(text, two=np.array(2, "f"), small=np.array(1e-6, "f"), power=np.array(-0.5, "f"))
    x = np.array([[1000, 2000, 3000, 4000]], np.float16)  # 4000² is beyond 65,504
    # Into float32 before the squares, and back behind the root.
    assert [node.op_type for node in model.graph].count("Cast") == 2
    (found,) = run_model(model, x=x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(found, wide / np.sqrt((wide**2).mean()), rtol=2e-3)


def test_a_weight_that_both_read_stands_there_twice():
    text = "g (float[1,4] w) => (float[1,4] y, float[1,4] z) { y = Cos(w) z = Neg(w) }"
    w = np.array([[2049, 1, 2, 3]], np.float32)
    y, z = run_model(halved(text, w=w))
    np.testing.assert_allclose(y, np.cos(w), rtol=0, atol=1e-3)
    assert z[0, 0] == -2048
    assert y.dtype == z.dtype == np.float16


def test_masks_stay_finite_and_infinity_stays_infinite():
    text = "g (float[3] x, float[3] w) => (float[3] y) { y = Add(x, w) }"
    w = np.array([np.finfo(np.float32).min, -np.inf, 1], np.float32)
    (found,) = run_model(halved(text, w=w), x=np.zeros(3, np.float16))
    assert found.tolist() == [-65504, -np.inf, 1]


def test_what_is_no_float_stays():
    text = """g (int64[1,3] ids, float[3] x) => (float[1,3] y, int64[2] shape) {
        shape = Shape(ids) zero = Constant <value_int = 0> () t = Greater(ids, zero) n = Neg(x) y = Where(t, x, n) }"""
    y, shape = run_model(halved(text), ids=np.array([[0, 1, 2]]), x=np.array([1, 2, 3], np.float16))
    assert (y.tolist(), shape.tolist()) == ([[-1, 2, 3]], [1, 3])


def test_an_export_in_float16_has_its_cache_in_it_and_its_logits_in_float32(exported):
    """tests/conformance has its numbers."""
    graph = exported("llama", "fp16").graph().graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]}
    assert types[names.LOGITS] == ir.DataType.FLOAT
    assert {kind for name, kind in types.items() if name.startswith(names.PAST_PREFIX)} == {ir.DataType.FLOAT16}

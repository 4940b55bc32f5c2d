"""Forms for Qualcomm's NPU: the same numbers, in operators that its compiler accepts."""

import numpy as np
import pytest

from pastkey.export.graph.edit import weight
from pastkey.export.graph.static.htp import suit_htp

from ...small_graphs import model_of, run_model

RNG = np.random.default_rng(0)


def changed_exactly(model, x):
    """Runs the passes, which change no number of the output. Returns the operators."""
    (before,) = run_model(model, x=x)
    suit_htp(model)
    (after,) = run_model(model, x=x)
    assert np.array_equal(after, before)
    return [node.op_type for node in model.graph]


NORM = ["Pow", "ReduceMean", "Add", "Sqrt", "Reciprocal", "Mul", "Mul"]


@pytest.mark.parametrize("products", ["n = Mul(x, r) y = Mul(w, n)", "n = Mul(r, x) y = Mul(n, w)", "y = Mul(x, r)"])
@pytest.mark.parametrize("sizes", [(3, 8), (1, 3, 8), (1, 3, 2, 8)])
def test_a_norm_has_at_most_three_axes_and_its_weight_second(sizes, products):
    axes = ",".join(map(str, sizes))
    model = model_of(
        f"g (float[{axes}] x, float[8] w, float two, float e, int64[1] last) => (float[{axes}] y) "
        "{ p = Pow(x, two) m = ReduceMean <keepdims = 1> (p, last) t = Add(m, e) s = Sqrt(t) r = Reciprocal(s) "
        f"{products} }}",
        w=RNG.standard_normal(8).astype(np.float32),
        two=np.array(2, np.float32),
        e=np.array(1e-6, np.float32),
        last=np.array([-1]),
    )
    operators = changed_exactly(model, 30 * RNG.standard_normal(sizes).astype(np.float32))
    assert operators == (["Reshape", *NORM, "Reshape"] if len(sizes) > 3 else NORM)
    product, scaled = [node for node in model.graph if node.op_type == "Mul"]
    assert [weight(value) is None for value in product.inputs] == [True, True]
    assert [weight(value) is None for value in scaled.inputs] == [True, False]


def test_rows_are_gathered_by_one_number_each():
    model = model_of(
        "g (float[4] x, float[4,3,5] w, int64[2,6,1] i, int64[6,2] j) => (float[2,6,3,5] y, float[6,5] z) "
        "{ y = GatherND(w, i) z = GatherND(w, j) }",
        w=RNG.standard_normal((4, 3, 5)).astype(np.float32),
        i=RNG.integers(-4, 4, (2, 6, 1)),
        j=RNG.integers(0, 3, (6, 2)),
    )
    before = run_model(model, x=np.zeros(4, np.float32))
    suit_htp(model)
    assert [node.op_type for node in model.graph] == ["Squeeze", "Gather", "GatherND"]
    for old, new in zip(before, run_model(model, x=np.zeros(4, np.float32)), strict=True):
        assert np.array_equal(old, new)


@pytest.mark.parametrize("operator", ["Tanh", "Neg", "Elu <alpha = 0.3>"])
def test_an_operator_of_five_axes_is_computed_over_four(operator):
    model = model_of(
        "g (float[1,2,3,4,5] x) => (float[1,2,3,4,5] y) "
        f"{{ c = Constant <value_float = 20.0> () a = Div(x, c) b = {operator} (a) y = Mul(b, c) }}"
    )
    operators = changed_exactly(model, 30 * RNG.standard_normal((1, 2, 3, 4, 5)).astype(np.float32))
    name = operator.partition(" ")[0]
    assert operators == ["Constant", "Div", "Reshape", name, "Reshape", "Mul"]
    sizes = [weight(node.inputs[1]) for node in model.graph if node.op_type == "Reshape"]
    assert [array.tolist() for array in sizes if array is not None] == [[2, 3, 4, 5], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize("operator", ["Tanh", "Sigmoid"])
def test_what_the_htp_takes_as_it_is_stays(operator):
    axes = "1,2,3,4" if operator == "Tanh" else "1,1,2,3,4"
    model = model_of(f"g (float[{axes}] x) => (float[{axes}] y) {{ y = {operator}(x) }}")
    x = RNG.standard_normal([int(size) for size in axes.split(",")]).astype(np.float32)
    assert changed_exactly(model, x) == [operator]

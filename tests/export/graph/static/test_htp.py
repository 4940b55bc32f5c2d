"""Forms for Qualcomm's NPU: the same numbers, in operators that its compiler takes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.export.graph.edit import weight
from pastkey.export.graph.static.htp import suit_htp

from ...small_graphs import model_of, run_model

RNG = np.random.default_rng(0)


def changed_exactly(model: ir.Model, x: np.ndarray) -> list[str]:
    """Runs the passes, which change no number of the output. Returns the operators."""
    (before,) = run_model(model, x=x)
    suit_htp(model)
    (after,) = run_model(model, x=x)
    assert np.array_equal(after, before)
    return [node.op_type for node in model.graph]


def test_a_norm_is_multiplied_by_its_weight_and_not_the_other_way_round() -> None:
    model = model_of(
        "g (float[1,3,8] x, float[8] w) => (float[1,3,8] y) { n = Neg(x) s = Mul(w, n) t = Mul(s, w) y = Mul(t, x) }",
        w=RNG.standard_normal(8).astype(np.float32),
    )
    x = RNG.standard_normal((1, 3, 8)).astype(np.float32)
    assert changed_exactly(model, x) == ["Neg", "Mul", "Mul", "Mul"]
    factors = [tuple(str(value.name) for value in node.inputs if value) for node in model.graph if len(node.inputs) > 1]
    assert factors == [("n", "w"), ("s", "w"), ("t", "x")]


@pytest.mark.parametrize("operator", ["Tanh", "Neg", "Elu <alpha = 0.3>"])
def test_an_operator_of_five_axes_is_computed_over_four(operator: str) -> None:
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
def test_what_the_htp_takes_as_it_is_stays(operator: str) -> None:
    axes = "1,2,3,4" if operator == "Tanh" else "1,1,2,3,4"
    model = model_of(f"g (float[{axes}] x) => (float[{axes}] y) {{ y = {operator}(x) }}")
    x = RNG.standard_normal([int(size) for size in axes.split(",")]).astype(np.float32)
    assert changed_exactly(model, x) == [operator]

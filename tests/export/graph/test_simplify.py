"""`simplify` changes no number."""

from __future__ import annotations

import numpy as np

from pastkey.export.graph.simplify import simplify

from ..small_graphs import Array, model_of, run_model

X = np.array([[1, 2, 3, 4], [0, 0, 0, 0]], np.float32)


def simplified(body: str, **weights: Array) -> list[str]:
    """The operators of the graph x (2, 4) -> y, which computes the same as before."""
    declared = "".join(f", float[{','.join(map(str, array.shape))}] {name}" for name, array in weights.items())
    model = model_of(f"g (float[2,4] x{declared}) => (float[2,4] y) {{ {body} }}", **weights)
    (before,) = run_model(model, x=X)
    simplify(model)
    np.testing.assert_array_equal(run_model(model, x=X)[0], before)
    return [node.op_type for node in model.graph]


def test_an_epsilon_of_1e_8_is_not_taken_for_zero():
    """A norm with it divides by the root of epsilon on a row of zeros, and by zero without."""
    assert simplified("a = Add(x, e) y = Sqrt(a)", e=np.full(1, 1e-8, np.float32)) == ["Add", "Sqrt"]


def test_two_transpositions_that_undo_each_other_go():
    body = "a = Transpose <perm = [1, 0]> (x) b = Transpose <perm = [1, 0]> (a) y = Neg(b)"
    assert "Transpose" not in simplified(body)


def test_what_depends_on_constants_alone_is_folded():
    two, three = np.full(4, 2, np.float32), np.full(4, 3, np.float32)
    assert simplified("p = Mul(two, three) y = Add(x, p)", two=two, three=three) == ["Add"]

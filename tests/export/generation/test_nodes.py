"""Branches, constants and checks, as onnxruntime runs them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.export.generation.nodes import Nodes, typed

from .small_models import BOOL, FLOAT, INT64, run


def test_a_branch_gives_what_its_condition_says() -> None:
    call = run(
        {"on": (BOOL, []), "x": (FLOAT, [3])},
        lambda n, given: n.branch(
            given["on"],
            lambda b: b.add("Add", given["x"], b.number(1, np.float32)),
            lambda b: b.branch(given["on"], lambda _: given["x"], lambda c: c.add("Neg", given["x"]), of=given["x"]),
            of=given["x"],
        ),
        FLOAT,
    )
    x = np.array([1, 2, 3], np.float32)
    np.testing.assert_array_equal(call(on=np.array(True), x=x), x + 1)
    np.testing.assert_array_equal(call(on=np.array(False), x=x), -x)


def test_a_constant_stands_once_for_each_content_and_type() -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}), ir_version=10)
    n = Nodes(model, "n")
    assert n.number(1) is n.number(1)
    assert len({id(n.number(1)), id(n.number([1])), id(n.number(1, np.float32)), id(n.number(2))}) == 4
    assert len(model.graph.initializers) == 4


def test_a_check_is_nought_or_an_error_with_the_sentence() -> None:
    call = run(
        {"x": (INT64, [1])},
        lambda n, given: n.require(n.add("Less", given["x"], n.number(5)), "x must be less than 5"),
        INT64,
    )
    assert call(x=np.array([4])).tolist() == [0]
    with pytest.raises(Exception, match="x must be less than 5"):
        call(x=np.array([5]))


def test_a_scalar_a_cast_and_a_filled_tensor() -> None:
    call = run(
        {"x": (INT64, [1])},
        lambda n, given: n.cast(n.add("Mul", n.scalar(given["x"]), n.filled(n.number([2]), 3, np.int64)), FLOAT),
        FLOAT,
    )
    found = call(x=np.array([4]))
    assert (found.dtype, found.tolist()) == (np.float32, [12, 12])
    assert typed("a", FLOAT, [1, None, "n"]).shape == ir.Shape([1, None, "n"])

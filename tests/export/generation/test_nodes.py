"""Branches, constants and checks, as onnxruntime runs them."""

from __future__ import annotations

import numpy as np
import pytest

from .small_models import BOOL, FLOAT, INT64, run


def test_a_branch_gives_what_its_condition_says():
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


def test_a_check_is_nought_or_an_error_with_the_sentence():
    call = run(
        {"x": (INT64, [1])},
        lambda n, given: n.require(n.add("Less", given["x"], n.number(5)), "x must be less than 5"),
        INT64,
    )
    assert call(x=np.array([4])).tolist() == [0]
    with pytest.raises(Exception, match="x must be less than 5"):
        call(x=np.array([5]))

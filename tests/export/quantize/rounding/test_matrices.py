"""Matrices are found in a graph, with their shapes, without being read."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.export.quantize.rounding.matrices import (
    add_lazy_weight,
    embedding_weight,
    lazy,
    matmul_weight,
    shape_of,
)

from ...small_graphs import model_of


def unread() -> np.ndarray:
    raise AssertionError("a matrix was read for its shape")


@pytest.mark.parametrize(
    ("body", "shape", "found"),
    [
        ("y = MatMul(x, w)", (8, 3), (3, 8)),
        ("t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t)", (3, 8), (3, 8)),
        ("y = Gemm <transB = 1> (x, w)", (3, 8), (3, 8)),
        ("y = Gemm <alpha = 2.0> (x, w)", (8, 3), None),
        ("y = Add(x, w)", (1, 8), None),
    ],
)
def test_a_weight_that_is_multiplied_by_is_found_unread(body, shape, found):
    text = f"g (float[2,8] x, float[{shape[0]},{shape[1]}] w) => (float[2,N] y) {{ {body} }}"
    model = model_of(text, w=np.zeros(shape, np.float32))
    value = model.graph.initializers["w"]
    value.const_value = lazy("w", ir.DataType.FLOAT, shape, unread)
    reads = [read for node in model.graph if (read := matmul_weight(node)) is not None]
    assert [read.shape for read in reads] == ([] if found is None else [found])


def test_a_gathered_table_is_found_unread_and_a_computed_value_has_no_shape():
    model = model_of(
        "g (int64[2] i, float[9,8] w) => (float[2,8] y) { y = Gather(w, i) }", w=np.zeros((9, 8), np.float32)
    )
    value = model.graph.initializers["w"]
    value.const_value = lazy("w", ir.DataType.FLOAT, (9, 8), unread)
    assert embedding_weight(model.graph[0]) is value
    assert shape_of(value) == (9, 8)
    assert shape_of(model.graph.outputs[0]) is None
    assert shape_of(None) is None


def test_a_lazy_weight_is_made_each_time_that_it_is_read():
    model = model_of("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    made = []

    def make() -> np.ndarray:
        made.append(1)
        return np.arange(6, dtype=np.uint8).reshape(2, 3)

    value = add_lazy_weight(model, "w", ir.DataType.UINT8, (2, 3), make)
    assert (value.const_value.nbytes, value.const_value.dtype, made) == (6, ir.DataType.UINT8, [])
    for times in (1, 2):
        np.testing.assert_array_equal(value.const_value.numpy(), [[0, 1, 2], [3, 4, 5]])
        assert len(made) == times

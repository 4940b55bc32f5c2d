"""The output head is found in the float32 graph, and marked where int8 nodes take its place."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.export.graph.write.output_head import output_head, take_head
from pastkey.export.quantize.adapters import take_adaptable
from pastkey.export.quantize.rounding.rewrite import quantize

from ...small_graphs import model_of

RNG = np.random.default_rng(0)


def head_of(body: str, columns: int = 32) -> ir.Model:
    """A graph x (1, T, columns) -> logits (1, T, 40) with the weights w (columns, 40), e (40, columns) and b (40,)."""
    weights = {
        "w": RNG.normal(size=(columns, 40)).astype(np.float32),
        "e": RNG.normal(size=(40, columns)).astype(np.float32),
        "b": RNG.normal(size=40).astype(np.float32),
    }
    return model_of(
        f"g (float[1,T,{columns}] x, float[{columns},40] w, float[40,{columns}] e, float[40] b)"
        f" => (float[1,T,40] logits) {{ {body} }}",
        **weights,
    )


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("logits = MatMul(x, w)", True),
        ("t = Transpose <perm = [1, 0]> (e) logits = MatMul(x, t)", True),
        ("p = MatMul(x, w) s = Add(p, b) t = Tanh(s) logits = Mul(t, b)", True),
        ("p = MatMul(x, w) logits = Softmax(p)", False),
        ("p = MatMul(x, w) q = MatMul(x, w) logits = Add(p, q)", False),
        ("t = Transpose <perm = [0, 2, 1]> (x) logits = MatMul(x, t)", False),
    ],
    ids=["plain", "tied", "bias_and_softcap", "positions_mixed", "two_products", "no_weight"],
)
def test_a_head_is_a_product_with_position_wise_operators_behind_it(body, found):
    model = head_of(body)
    head = output_head(model)
    assert (head is not None) == found
    if head is not None:
        assert (head.op_type, head.inputs[0].name) == ("MatMul", "x")
    assert take_head(model) == [node for node in (head,) if node is not None]


@pytest.mark.parametrize("columns", [32, 40], ids=["whole_blocks", "padded"])
@pytest.mark.parametrize("body", ["logits = MatMul(x, w)", "p = MatMul(x, w) s = Add(p, b) logits = Tanh(s)"])
def test_an_int8_head_is_marked_with_all_that_reads_its_input(body, columns):
    model = head_of(body, columns)
    quantize(model)
    head = take_head(model)
    assert len(head) > 8
    assert sum(node.op_type == "MatMulNBits" for node in head) == 1
    (x,) = model.graph.inputs
    readers = {node.op_type for node, _ in x.uses()}
    assert readers == {"Sub", "Pad" if columns % 32 else "Reshape"}
    assert all(node in head for node, _ in x.uses())
    assert head[0].inputs[0] is x
    take_adaptable(model)
    assert not any(node.metadata_props for node in model.graph)  # taken once


def test_a_head_that_stays_in_float32_is_found():
    model = head_of("logits = MatMul(x, w)")
    quantize(model, keep=["w"])
    assert [node.op_type for node in take_head(model)] == ["MatMul"]


def test_a_graph_without_logits_has_no_head():
    model = model_of("g (float[2,3] x) => (float[2,3] y) { y = Identity(x) }")
    assert output_head(model) is None

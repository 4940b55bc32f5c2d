"""What depends on one input alone is found, cut out and run."""

from __future__ import annotations

import numpy as np

from pastkey.export.graph.part import Part, constant, depends_only_on

from ..small_graphs import model_of

TEXT = (
    "g (int64[1,3] position_ids, float[1,3] x, float[1,3] w) => (float[1,3] logits) { "
    "p = Cast <to = 1> (position_ids) v = Neg(w) q = Mul(p, v) s = Sin(q) y = Mul(s, x) logits = Neg(y) }"
)
W = np.array([[1, 2, 3]], np.float32)


def test_the_values_of_one_input_and_constants_are_found():
    model = model_of(TEXT, w=W)
    source = model.graph.inputs[0]
    inside = depends_only_on(model, [source])
    values = {value.name: value for node in model.graph for value in node.outputs}
    assert {name for name, value in values.items() if id(value) in inside} == {"p", "q", "s"}
    assert [name for name, value in values.items() if constant(value)] == ["v"]


def test_a_part_gives_what_the_graph_computes_and_leaves_it_alone():
    model = model_of(TEXT, w=W)
    sine = next(node.outputs[0] for node in model.graph if node.op_type == "Sin")
    part = Part(model, sine, model.graph.inputs[0])
    np.testing.assert_allclose(part.run(np.array([[4, 5, 6]])), np.sin(-W * [4, 5, 6]), atol=1e-6)
    assert [node.op_type for node in model.graph] == ["Cast", "Neg", "Mul", "Sin", "Mul", "Neg"]

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.export.graph import edit


@pytest.fixture
def model():
    """y = Neg(a), z = Abs(a), where a = Relu(x)."""
    return ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 20]>\n'
        "g (float[3] x) => (float[3] y, float[3] z) { a = Relu(x) y = Neg(a) z = Abs(a) }"
    )


def node_of(model: ir.Model, operator: str) -> ir.Node:
    (found,) = (node for node in model.graph if node.op_type == operator)
    return found


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_a_weight_is_the_array_itself_and_no_other_value_is_one(model):
    array = np.ones(3, np.float32)
    value = edit.add_weight(model, "w", array)
    assert edit.weight(value) is array
    assert edit.weight(model.graph.inputs[0]) is None
    assert edit.weight(node_of(model, "Relu").outputs[0]) is None
    assert edit.weight(None) is None


def test_weights_that_nothing_reads_are_dropped(model):
    used, _ = edit.add_weight(model, "used", np.ones(3)), edit.add_weight(model, "unused", np.ones(3))
    node_of(model, "Neg").replace_input_with(0, used)
    edit.drop_unused_weights(model)
    assert set(model.graph.initializers) == {"used"}


def test_an_output_that_is_replaced_keeps_name_type_and_place(model):
    neg = node_of(model, "Neg")
    sqrt = ir.node("Sqrt", [neg.inputs[0]])
    edit.replace_node(model, neg, sqrt)
    assert operators(model) == ["Relu", "Sqrt", "Abs"]
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    assert model.graph.outputs[0] is sqrt.outputs[0]
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT


def test_several_nodes_stand_in_for_one_and_every_reader_follows(model):
    relu = node_of(model, "Relu")
    builder = edit.NodeBuilder(model, "clipped")
    low = builder.add("Max", relu.inputs[0], builder.constant("zero", np.zeros(1, np.float32)))
    builder.add("Min", low, builder.constant("six", np.full(1, 6, np.float32)))
    edit.replace_node(model, relu, *builder.nodes)
    assert operators(model) == ["Max", "Min", "Neg", "Abs"]
    assert {edit.input_of(node_of(model, name).inputs[0], "Min") for name in ("Neg", "Abs")} == {low}
    assert {"clipped.zero", "clipped.six"} == set(model.graph.initializers)
    names = [output.name for node in model.graph for output in node.outputs]
    assert len(set(names)) == len(names)

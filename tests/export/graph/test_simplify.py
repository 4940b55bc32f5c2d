"""`simplify` changes no number."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pastkey.export.graph.simplify import simplify


def graph(*nodes: ir.Node, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
    constants = {
        value.name: value
        for node in nodes
        for value in node.inputs
        if value is not None and value.const_value is not None
    }
    made = ir.Graph(inputs, outputs, nodes=nodes, initializers=list(constants.values()), opset_imports={"": 20})
    return ir.Model(made, ir_version=10)


def constant(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def floats(name: str, *shape: int) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def test_an_epsilon_of_1e_8_is_not_taken_for_zero() -> None:
    """A norm with it divides by the root of epsilon on a row of zeros, and by zero without."""
    x = floats("x", 2, 4)
    added = ir.node("Add", [x, constant("epsilon", np.array(1e-8, np.float32))])
    root = ir.node("Sqrt", [added.outputs[0]])
    root.outputs[0].name = "y"
    model = graph(added, root, inputs=[x], outputs=[root.outputs[0]])
    simplify(model)
    assert [node.op_type for node in model.graph] == ["Add", "Sqrt"]


def test_two_transpositions_that_undo_each_other_go() -> None:
    x = floats("x", 2, 4)
    once = ir.node("Transpose", [x], {"perm": [1, 0]})
    twice = ir.node("Transpose", [once.outputs[0]], {"perm": [1, 0]})
    last = ir.node("Neg", [twice.outputs[0]])
    last.outputs[0].name = "y"
    model = graph(once, twice, last, inputs=[x], outputs=[last.outputs[0]])
    simplify(model)
    assert [node.op_type for node in model.graph if node.op_type == "Transpose"] == []


def test_what_depends_on_constants_alone_is_folded() -> None:
    x = floats("x", 2)
    two, three = constant("two", np.full(2, 2, np.float32)), constant("three", np.full(2, 3, np.float32))
    product = ir.node("Mul", [two, three])
    total = ir.node("Add", [x, product.outputs[0]])
    total.outputs[0].name = "y"
    model = graph(product, total, inputs=[x], outputs=[total.outputs[0]])
    simplify(model)
    assert [node.op_type for node in model.graph] == ["Add"]
    folded = model.graph[0].inputs[1]
    assert folded is not None
    assert folded.const_value is not None
    assert folded.const_value.numpy().tolist() == [6, 6]

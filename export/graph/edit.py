"""Edits of an onnx_ir graph that the passes share: weights, replacements, and lookups of producers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

OPSET = 20  # Gelu is one operator since 20; onnxruntime 1.24 and the execution providers support it
IR_VERSION = 10  # onnxruntime loads it since 1.18
CONTRIB_DOMAIN = "com.microsoft"  # domain of onnxruntime's own operators
# The operators that keep a state, in float32 only.
STATEFUL = ("CausalConvWithState", "LinearAttention", "GRU", "LSTM", "RNN", "Scan", "CumSum")
_FIRST_STEERING = 4  # LinearAttention's inputs from here on: decay, then beta
_STEPS = {"Add", "Clip", "Exp", "Mul", "Neg", "Reshape", "Sigmoid", "Softplus", "Unsqueeze"}


def weight(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer, or None for any other value."""
    if value is None or value.const_value is None or value.producer() is not None:
        return None
    return value.const_value.numpy()


def shape_of(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of an initializer, whose content is not read, or None for any other value."""
    if value is None or value.const_value is None or value.producer() is not None:
        return None
    return tuple(value.const_value.shape.numpy())


def steering(model: ir.Model) -> set[ir.Node]:
    """The nodes between projections and the decay or the beta of recurrences."""
    values = [v for node in model.graph if node.op_type == "LinearAttention" for v in node.inputs[_FIRST_STEERING:]]
    found = set[ir.Node]()
    while values:
        value = values.pop()
        node = None if value is None else value.producer()
        if node is not None and node.op_type in _STEPS and node not in found:
            found.add(node)
            values += node.inputs
    return found


def add_weight(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """Adds an initializer that holds this array without a copy."""
    return add_tensor(model, name, ir.Tensor(array))


def add_tensor(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Adds an initializer with this content."""
    tensor.name = name
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def replace_uses(old: ir.Value, new: ir.Value) -> None:
    """Makes every node that reads `old` read `new`."""
    for node, index in tuple(old.uses()):
        node.replace_input_with(index, new)


def replace_value(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    """Gives `new` the name, type, shape, readers and output position of `old`."""
    name, old.name = old.name, None
    new.name, new.type, new.shape = name, old.type, old.shape
    replace_uses(old, new)
    for place, end in enumerate(model.graph.outputs):
        if end is old:
            model.graph.outputs[place] = new


def replace_node(model: ir.Model, old: ir.Node, *nodes: ir.Node) -> None:
    """Replaces `old` by `nodes`. The last node's outputs replace those of `old`, one by one."""
    model.graph.insert_before(old, nodes)
    for number, node in enumerate(nodes[:-1]):
        for place, output in enumerate(node.outputs):
            output.name = f"{old.outputs[0].name}_part_{number}" + (f"_{place}" if place else "")
    for output, new in zip(old.outputs, nodes[-1].outputs, strict=True):
        replace_value(model, output, new)
    model.graph.remove(old, safe=True)


def drop_unused_weights(model: ir.Model) -> None:
    """Removes the initializers that no node reads."""
    for name, value in tuple(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def producer(value: ir.Value | None, operator: str) -> ir.Node | None:
    """Returns the node that produces the value if it is of that type."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == operator else None


def input_of(value: ir.Value | None, operator: str) -> ir.Value | None:
    """Returns the first input of the value's producer if that is of that type."""
    node = producer(value, operator)
    return None if node is None else node.inputs[0]


def sole_consumer(value: ir.Value) -> ir.Node | None:
    """Returns the one node that reads the value, None if there are several or none."""
    readers = [node for node, _ in value.uses()]
    return readers[0] if len(readers) == 1 else None


class NodeBuilder:
    """Builds a sequence of nodes, named after `name`, and their constants. The nodes are not yet in a graph.

    onnx_ir's Tape does not name nodes, and adds initializers to a graph only if it appends the nodes to that graph.
    """

    def __init__(self, model: ir.Model, name: str) -> None:
        self._model, self._name = model, name
        self.nodes: list[ir.Node] = []

    def add(self, operator: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Adds a node of ONNX's domain or `domain`, with numbers or `ir.Attr` as attributes. Returns its output."""
        return self.add_several(operator, 1, *inputs, **attributes)[0]

    def add_several(
        self, operator: str, outputs: int, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """As `add`, for a node with several outputs."""
        name = f"{self._name}_{operator}_{len(self.nodes)}"
        new = ir.node(operator, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for place, output in enumerate(new.outputs):
            output.name = f"{name}_output" + (f"_{place}" if place else "")
        self.nodes.append(new)
        return tuple(new.outputs)

    def constant(self, what: str, content: np.ndarray) -> ir.Value:
        """Adds an initializer."""
        return add_weight(self._model, f"{self._name}.{what}", content)

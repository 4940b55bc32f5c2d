"""The output head: the MatMul that computes the logits from the last hidden state.

It is looked up once, in the float32 graph. A pass that replaces it marks the new nodes, so that later passes find them.
`take_head` removes the marks before the graph is saved.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from pastkey.contract import names

from ..edit import shape_of
from ..part import constant

_MARK = "pastkey.output_head"  # key in a node's metadata
# Operators that process each position by itself, so that one position can be selected before them.
_POSITIONWISE = {"Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity", "Neg", "Min", "Max", "Clip"}


def output_head(model: ir.Model) -> ir.Node | None:
    """Returns the MatMul (B, T, hidden) x (hidden, V) of a float32 graph that computes the logits, or None.

    Only position-wise operators, such as a bias or a softcap, are between it and the logits.
    """
    logits = next((value for value in model.graph.outputs if value.name == names.LOGITS), None)
    node = None if logits is None else logits.producer()
    while node is not None and node.op_type in _POSITIONWISE:
        made = [value for value in node.inputs if value is not None and not constant(value)]
        if len(made) != 1:
            return None
        node = made[0].producer()
    if node is None or node.op_type != "MatMul" or node.inputs[1] is None or not constant(node.inputs[1]):
        return None
    return node


def hidden_size(head: ir.Node) -> int | None:
    """Returns H, the width of the output head's input in a float32 graph, or None if its weight does not show it."""
    value, axis = head.inputs[1], 0
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Transpose", "Identity", "Cast"):
        axis = 1 - axis if node.op_type == "Transpose" else axis
        value = node.inputs[0]
        node = None if value is None else value.producer()
    shape = shape_of(value)
    return shape[axis] if shape is not None and len(shape) == 2 else None


def mark_head(nodes: Iterable[ir.Node]) -> None:
    """Marks these nodes as the output head. The first of them in the graph reads the hidden state as input 0."""
    for node in nodes:
        node.metadata_props[_MARK] = ""


def take_head(model: ir.Model) -> list[ir.Node]:
    """Returns the nodes of the output head in the graph's order: the marked ones, or those that `output_head` finds.

    Removes the marks. Empty if the logits are computed in another way.
    """
    marked = [node for node in model.graph if node.metadata_props.pop(_MARK, None) is not None]
    if marked:
        return marked
    found = output_head(model)
    return [] if found is None else [found]

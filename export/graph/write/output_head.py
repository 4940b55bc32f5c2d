"""The output head: the MatMul that makes the logits of the last hidden state.

It is found once, in the float32 graph. Who puts other nodes in its place marks them, so that nobody recognises them
again. Marks are for the passes that follow and stand in no file: `take_head` removes them.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from pastkey.contract import names

from ..edit import weight

_MARK = "pastkey.output_head"  # in a node's metadata
# Operators that treat every position by itself, so that choosing one position may come before them.
_POSITIONWISE = {"Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity", "Neg", "Min", "Max", "Clip"}


def output_head(model: ir.Model) -> ir.Node | None:
    """The node (B, T, hidden) x (hidden, V) of a float32 graph that makes the logits, None where there is no such.

    Between it and the logits are position-wise operators only, as a bias or a softcap.
    """
    logits = next((value for value in model.graph.outputs if value.name == names.LOGITS), None)
    node = None if logits is None else logits.producer()
    while node is not None and node.op_type in _POSITIONWISE:
        made = [value for value in node.inputs if value is not None and not _constant(value)]
        if len(made) != 1:
            return None
        node = made[0].producer()
    if node is None or node.op_type != "MatMul" or not _constant(node.inputs[1]):
        return None
    return node


def hidden_size(head: ir.Node) -> int | None:
    """H, the width of what the output head of a float32 graph multiplies; None where its weight does not show it."""
    value, axis = head.inputs[1], 0
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Transpose", "Identity", "Cast"):
        axis = 1 - axis if node.op_type == "Transpose" else axis
        value = node.inputs[0]
        node = None if value is None else value.producer()
    array = weight(value)
    return array.shape[axis] if array is not None and array.ndim == 2 else None


def mark_head(nodes: Iterable[ir.Node]) -> None:
    """Says that these nodes are the output head now. The graph's first of them reads the hidden state as input 0."""
    for node in nodes:
        node.metadata_props[_MARK] = ""


def take_head(model: ir.Model) -> list[ir.Node]:
    """The nodes of the output head in the graph's order: those that were marked, or else the one that is found.

    Removes the marks. Empty where the logits are made in another way.
    """
    marked = [node for node in model.graph if node.metadata_props.pop(_MARK, None) is not None]
    if marked:
        return marked
    found = output_head(model)
    return [] if found is None else [found]


def _constant(value: ir.Value | None) -> bool:
    """An initializer, or computed from nothing else: a transposed one."""
    producer = None if value is None else value.producer()
    if producer is None:
        return weight(value) is not None
    return bool(producer.inputs) and all(_constant(v) for v in producer.inputs if v is not None)

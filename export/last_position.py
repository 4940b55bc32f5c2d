"""pastkey's own graph of the common one: the logits of the last position only, which is what generation needs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pastkey import names

from .graph import add_weight, input_of, made_by, weight

# Operators that treat every position by itself, so that choosing one position may come before them.
_POSITIONWISE = {"Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity", "Neg", "Min", "Max", "Clip"}
_PRODUCTS = {"MatMul", "MatMulNBits"}


def keep_last_position(model: ir.Model) -> None:
    """Makes `logits` (B, 1, V), of the last of the new tokens, choosing it before the output head where it can."""
    logits = next(value for value in model.graph.outputs if value.name == names.LOGITS)
    product = output_head(logits)
    if product is not None:
        hidden, readers = _hidden(product)
        chosen = _last_of(model, hidden, before=readers[0])
        for reader in readers:
            reader.replace_input_with(0, chosen)
    else:
        node = logits.producer()
        assert node is not None
        logits.name = f"{names.LOGITS}_of_every_position"
        chosen = _last_of(model, logits, after=node)
        chosen.name, chosen.type, chosen.shape = names.LOGITS, logits.type, logits.shape
        model.graph.outputs[list(model.graph.outputs).index(logits)] = chosen
        logits = chosen
    assert logits.shape is not None
    logits.shape = ir.Shape((names.BATCH, 1, logits.shape[-1]))


def output_head(logits: ir.Value) -> ir.Node | None:
    """The product (B, T, hidden) x (hidden, V) that makes the logits, through nothing but position-wise operators."""
    node = logits.producer()
    while node is not None and (node.op_type in _POSITIONWISE or _sums_readings(node)):
        made = [value for value in node.inputs if value is not None and not _constant(value)]
        if len(made) != 1:
            return None
        node = made[0].producer()
    if node is None or node.op_type not in _PRODUCTS or not all(_constant(v) for v in node.inputs[1:] if v):
        return None
    return node


def _sums_readings(node: ir.Node) -> bool:
    """What an int8 head ends in: its product (2, B, T, V) of two readings, summed over the first axis."""
    if node.op_type != "ReduceSum" or len(node.inputs) < 2 or made_by(node.inputs[0], "MatMulNBits") is None:
        return False
    axes = weight(node.inputs[1])
    return axes is not None and axes.tolist() == [0]


def _hidden(product: ir.Node) -> tuple[ir.Value, list[ir.Node]]:
    """What the head reads, and the nodes that do, in order: of an int8 head, those that make its two readings of it."""
    twice = made_by(product.inputs[0], "Concat")
    rest = None if twice is None else made_by(input_of(twice.inputs[1], "Unsqueeze"), "Sub")
    hidden = product.inputs[0] if rest is None else rest.inputs[0]
    assert hidden is not None
    if rest is None:
        return hidden, [product]
    return hidden, [*(node for node, _ in hidden.uses() if node.op_type in ("Reshape", "Pad")), rest]


def _constant(value: ir.Value) -> bool:
    """An initializer, or computed from nothing else: a transposed one, scales."""
    producer = value.producer()
    if producer is None:
        return weight(value) is not None
    return bool(producer.inputs) and all(_constant(v) for v in producer.inputs if v is not None)


def _last_of(model: ir.Model, value: ir.Value, before: ir.Node | None = None, after: ir.Node | None = None) -> ir.Value:
    """value[:, -1:] as a node."""
    bounds = [
        add_weight(model, f"last_position_{name}", np.array([number], np.int64))
        for name, number in (("start", -1), ("end", np.iinfo(np.int64).max), ("axis", 1))
    ]
    node = ir.node("Slice", [value, *bounds], name="last_position")
    node.outputs[0].name = "last_position"
    if before is not None:
        model.graph.insert_before(before, node)
    else:
        assert after is not None
        model.graph.insert_after(after, node)
    return node.outputs[0]

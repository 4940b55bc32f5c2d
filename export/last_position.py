"""pastkey's own graph of the common one: the logits of the last positions only, as many as the runtime asks for.

Generation needs one, or those of a few tokens that are tried at once.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pastkey import names

from .graph import Steps, made_by, weight

# Operators that treat every position by itself, so that choosing one position may come before them.
_POSITIONWISE = {"Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity", "Neg", "Min", "Max", "Clip"}
_PRODUCTS = {"MatMul", "MatMulNBits"}


def keep_last_positions(model: ir.Model) -> None:
    """Makes `logits` those of the last of the new tokens, (B, N, V), choosing before the output head where it can.

    N is a new input, `logits_to_keep`.
    """
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
    logits.shape = ir.Shape((names.BATCH, names.LOGITS_TO_KEEP, logits.shape[-1]))


def output_head(logits: ir.Value) -> ir.Node | None:
    """The product (B, T, hidden) x (hidden, V) that makes the logits, through nothing but position-wise operators."""
    node = logits.producer()
    while node is not None and node.op_type in _POSITIONWISE:
        readings = _summed_readings(node)
        if readings is not None:
            return readings
        made = [value for value in node.inputs if value is not None and not _constant(value)]
        if len(made) != 1:
            return None
        node = made[0].producer()
    if node is None or node.op_type not in _PRODUCTS or not all(_constant(v) for v in node.inputs[1:] if v):
        return None
    return node


def _summed_readings(node: ir.Node) -> ir.Node | None:
    """What an int8 head ends in: its product (B, 2 T, V) of two readings, whose halves `node` adds."""
    makers = {made_by(value, "Split") for value in node.inputs}
    halves = makers.pop()
    if node.op_type != "Add" or makers or halves is None:
        return None
    return made_by(halves.inputs[0], "MatMulNBits")


def _hidden(product: ir.Node) -> tuple[ir.Value, list[ir.Node]]:
    """What the head reads, and the nodes that do, in order: of an int8 head, those that make its two readings of it."""
    twice = made_by(product.inputs[0], "Concat")
    rest = None if twice is None else made_by(twice.inputs[1], "Sub")
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
    """value[:, -N:] as nodes."""
    count = ir.Value(name=names.LOGITS_TO_KEEP, shape=ir.Shape((1,)), type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.append(count)
    steps = Steps(model, "last_positions")
    start = steps.add("Neg", count)
    end, axis = (steps.constant(n, np.array([i])) for n, i in (("end", np.iinfo(np.int64).max), ("axis", 1)))
    chosen = steps.add("Slice", value, start, end, axis)
    if before is not None:
        model.graph.insert_before(before, steps.nodes)
    else:
        assert after is not None
        model.graph.insert_after(after, steps.nodes)
    return chosen

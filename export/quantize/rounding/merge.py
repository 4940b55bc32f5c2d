"""Merges q, k, v and gate, up projections: threads start less often, and each activation is quantized once.

1. q, k and v of one GroupQueryAttention            -> one MatMul, which the operator accepts directly
2. others that read one activation, as gate and up  -> one MatMul and a Split
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...graph.edit import add_weight, producer, replace_value, sole_consumer, weight


@dataclass(frozen=True)
class Projections:
    """MatMuls that read one activation, in the order in which their outputs are concatenated."""

    matmuls: tuple[ir.Node, ...]
    attention: ir.Node | None = None  # the operator that reads the concatenated output


def find_mergeable(matmuls: list[ir.Node]) -> list[Projections]:
    """Groups `matmuls`, a graph's MatMuls by weights in its order. Each is in at most one `Projections`."""
    readers: dict[int, list[ir.Node]] = {}
    for node in matmuls:
        if node.inputs[0] is not None:
            readers.setdefault(id(node.inputs[0]), []).append(node)
    mergeable = []
    for nodes in readers.values():
        attention = _attention_of(nodes)
        if attention is not None:
            mergeable.append(attention)
            nodes = [node for node in nodes if node not in attention.matmuls]
        if len(nodes) > 1:
            mergeable.append(Projections(tuple(nodes)))
    return mergeable


def _attention_of(matmuls: list[ir.Node]) -> Projections | None:
    """Matches rule 1: these MatMuls make q, k and v, nothing else reads them, and all or none have a bias."""
    for node in matmuls:
        reader = sole_consumer(node.outputs[0])
        if reader is not None and reader.op_type == "Add":
            reader = sole_consumer(reader.outputs[0])
        if reader is None or reader.op_type != "GroupQueryAttention":
            continue
        found = [_with_bias(value) for value in reader.inputs[:3]]
        producers = [matmul for matmul, _ in found if matmul is not None and matmul in matmuls]
        biased = {bias is not None for _, bias in found}
        if len({id(matmul) for matmul in producers}) == 3 and len(biased) == 1:
            return Projections(tuple(producers), reader)
    return None


def _with_bias(value: ir.Value | None) -> tuple[ir.Node | None, ir.Value | None]:
    """Returns the MatMul that makes a value with a single reader, and the bias added to it."""
    if value is None or sole_consumer(value) is None:
        return None, None
    total = producer(value, "Add")
    if total is None:
        return producer(value, "MatMul"), None
    vectors = [v for v in total.inputs if (array := weight(v)) is not None and array.ndim == 1]
    made = [v for v in total.inputs if weight(v) is None]
    if len(vectors) != 1 or len(made) != 1 or made[0] is None or sole_consumer(made[0]) is None:
        return None, None
    return producer(made[0], "MatMul"), vectors[0]


def insert_merged(model: ir.Model, projections: Projections, merged: ir.Node, widths: list[int]) -> None:
    """Replaces the projections by `merged`, a MatMul (..., sum of widths) whose output has no name yet."""
    first = projections.matmuls[0]
    merged.outputs[0].name = f"{first.outputs[0].name}_joined"
    model.graph.insert_before(first, merged)
    if projections.attention is not None:
        _feed_merged(model, projections, projections.attention, merged)
        return
    sizes = add_weight(model, f"{first.name}_widths", np.array(widths, np.int64))
    parts = ir.node(
        "Split", [merged.outputs[0], sizes], {"axis": -1}, num_outputs=len(widths), name=f"{first.name}_split"
    )
    model.graph.insert_after(merged, parts)
    for matmul, part in zip(projections.matmuls, parts.outputs, strict=True):
        replace_value(model, matmul.outputs[0], part)
        model.graph.remove(matmul, safe=True)


def _feed_merged(model: ir.Model, projections: Projections, attention: ir.Node, merged: ir.Node) -> None:
    """Applies rule 1: the operator reads queries, keys and values as its first input and leaves the next two empty."""
    qkv = merged.outputs[0]
    biases = [bias for _, bias in map(_with_bias, attention.inputs[:3]) if bias is not None]
    if biases:
        arrays = [array for bias in biases if (array := weight(bias)) is not None]
        name = f"{projections.matmuls[0].name}_joined_bias"
        total = ir.node("Add", [qkv, add_weight(model, name, np.concatenate(arrays))], name=name)
        total.outputs[0].name = f"{name}_output"
        model.graph.insert_after(merged, total)
        qkv = total.outputs[0]
    adds = [value.producer() for value in attention.inputs[:3] if value is not None and biases]
    for index, value in enumerate((qkv, None, None)):
        attention.replace_input_with(index, value)
    for node in (*adds, *projections.matmuls):
        if node is not None:
            model.graph.remove(node, safe=True)

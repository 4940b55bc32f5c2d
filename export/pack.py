"""Products that read one activation become one: fewer starts of the threads, and each activation quantized once.

1. q, k and v of one GroupQueryAttention    -> one product, which the operator takes as it is
2. others, as gate and up                   -> one product and a Split
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .graph import add_weight, made_by, only_reader, take_over, weight


@dataclass(frozen=True)
class Pack:
    """Products that read one activation, in the order in which their outputs are joined."""

    products: tuple[ir.Node, ...]
    attention: ir.Node | None = None  # which takes the joined output


def find_packs(products: list[ir.Node]) -> list[Pack]:
    """`products` are the MatMuls by weights of a graph, in its order. Each is in one pack at most."""
    readers: dict[int, list[ir.Node]] = {}
    for node in products:
        if node.inputs[0] is not None:
            readers.setdefault(id(node.inputs[0]), []).append(node)
    packs = []
    for nodes in readers.values():
        attention = _attention_of(nodes)
        if attention is not None:
            packs.append(attention)
            nodes = [node for node in nodes if node not in attention.products]
        if len(nodes) > 1:
            packs.append(Pack(tuple(nodes)))
    return packs


def _attention_of(products: list[ir.Node]) -> Pack | None:
    """Rule 1, where q, k and v all come from these products and go nowhere else, all with a bias or all without."""
    for node in products:
        reader = only_reader(node.outputs[0])
        if reader is not None and reader.op_type == "Add":
            reader = only_reader(reader.outputs[0])
        if reader is None or reader.op_type != "GroupQueryAttention":
            continue
        found = [_with_bias(value) for value in reader.inputs[:3]]
        makers = [product for product, _ in found if product is not None and product in products]
        biased = {bias is not None for _, bias in found}
        if len({id(maker) for maker in makers}) == 3 and len(biased) == 1:
            return Pack(tuple(makers), reader)
    return None


def _with_bias(value: ir.Value | None) -> tuple[ir.Node | None, ir.Value | None]:
    """The product that makes a value read by one node only, and the vector that is added to it."""
    if value is None or only_reader(value) is None:
        return None, None
    total = made_by(value, "Add")
    if total is None:
        return made_by(value, "MatMul"), None
    vectors = [v for v in total.inputs if (array := weight(v)) is not None and array.ndim == 1]
    made = [v for v in total.inputs if weight(v) is None]
    if len(vectors) != 1 or len(made) != 1 or made[0] is None or only_reader(made[0]) is None:
        return None, None
    return made_by(made[0], "MatMul"), vectors[0]


def split_up(model: ir.Model, pack: Pack, joined: ir.Node, widths: list[int]) -> None:
    """Puts `joined`, a product (..., sum of widths) without a name for its output, in the place of the pack's own."""
    first = pack.products[0]
    joined.outputs[0].name = f"{first.outputs[0].name}_joined"
    model.graph.insert_before(first, joined)
    if pack.attention is not None:
        _feed_joined(model, pack, joined)
        return
    sizes = add_weight(model, f"{first.name}_widths", np.array(widths, np.int64))
    parts = ir.node(
        "Split", [joined.outputs[0], sizes], {"axis": -1}, num_outputs=len(widths), name=f"{first.name}_split"
    )
    model.graph.insert_after(joined, parts)
    for product, part in zip(pack.products, parts.outputs, strict=True):
        take_over(model, product.outputs[0], part)
        model.graph.remove(product, safe=True)


def _feed_joined(model: ir.Model, pack: Pack, joined: ir.Node) -> None:
    attention, packed = pack.attention, joined.outputs[0]
    assert attention is not None
    biases = [bias for _, bias in map(_with_bias, attention.inputs[:3]) if bias is not None]
    if biases:
        arrays = [array for bias in biases if (array := weight(bias)) is not None]
        name = f"{pack.products[0].name}_joined_bias"
        total = ir.node("Add", [packed, add_weight(model, name, np.concatenate(arrays))], name=name)
        total.outputs[0].name = f"{name}_output"
        model.graph.insert_after(joined, total)
        packed = total.outputs[0]
    adds = [value.producer() for value in attention.inputs[:3] if value is not None and biases]
    for index, value in enumerate((packed, None, None)):
        attention.replace_input_with(index, value)
    for node in (*adds, *pack.products):
        if node is not None:
            model.graph.remove(node, safe=True)

"""The adapter graph: the last-logits graph in which every product `x W` becomes `x W + (x A) B`, for LoRA adapters.

A (K, R) and B (R, N) are inputs, lora_A.0, lora_B.0 and so on, of any rank. A matrix that several projections were
merged into has one pair, whose B is zero outside the columns of each projection. The graph's metadata names the
projections of each pair, and has the changes of their channels: `runtime/engine/lora.py` makes the pairs of an adapter.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from pastkey.contract import names

from ..graph.edit import NodeBuilder
from .changes import SCALED, take_changes
from .rounding.matrices import take_weights


@dataclass(frozen=True)
class Product:
    """A node that multiplies by the matrices of one or more projections."""

    node: ir.Node
    columns: int  # K
    weights: list[tuple[str, int]]  # name and N of each matrix


@dataclass(frozen=True)
class Adaptable:
    """The facts that a graph shows of its matrices before it is written."""

    products: list[Product]
    changes: dict[str, str]


def take_adaptable(model: ir.Model) -> Adaptable:
    """Removes the marks and the changes of matrices from a graph, which must not be saved with it."""
    products = [Product(node, *found) for node in model.graph if (found := take_weights(node)) is not None]
    return Adaptable(products, take_changes(model))


def write_adapter_graph(model: ir.Model, adaptable: Adaptable, path: Path) -> int:
    """Writes the adapter graph, made of the last-logits graph `model`, which is changed.

    Returns the number of its pairs, of products by weights of modules. Without any, nothing is written.
    """
    pairs: list[list[tuple[str | None, str, int]]] = []
    for product in adaptable.products:
        modules = [(_module(name), name, rows) for name, rows in product.weights]
        if any(module is not None for module, _, _ in modules):
            _add_pair(model, product, len(pairs))
            pairs.append(modules)
    if pairs:
        model.metadata_props[names.ADAPTED] = json.dumps(pairs)
        model.metadata_props.update(adaptable.changes)
        ir.save(model, path)
    return len(pairs)


def _module(weight: str) -> str | None:
    """The name of the module of a weight, or None for a parameter of another name."""
    plain = weight.rpartition(SCALED)[0] or weight
    return plain.removesuffix(".weight") if plain.endswith(".weight") else None


def _add_pair(model: ir.Model, product: Product, number: int) -> None:
    """Adds (x A) B to the output of a product."""
    node, rows = product.node, sum(rows for _, rows in product.weights)
    output, rank = node.outputs[0], f"lora_rank_{number}"
    pair = []
    for name, shape in ((names.lora_a(number), (product.columns, rank)), (names.lora_b(number), (rank, rows))):
        pair.append(ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT)))
    model.graph.inputs.extend(pair)
    readers, builder = tuple(output.uses()), NodeBuilder(model, f"{node.name}_lora")
    total = builder.add("Add", output, builder.add("MatMul", builder.add("MatMul", node.inputs[0], pair[0]), pair[1]))
    model.graph.insert_after(node, builder.nodes)
    for reader, index in readers:
        reader.replace_input_with(index, total)
    for place, end in enumerate(model.graph.outputs):
        if end is output:
            total.name, total.type, total.shape = output.name, output.type, output.shape
            output.name, output.type, output.shape = f"{output.name}_of_base", None, None
            model.graph.outputs[place] = total

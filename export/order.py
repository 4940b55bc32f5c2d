"""Channels in the order of their size, so that those of one block are alike. Exact, and free at run time.

The channels between two layers of products, as those of gate and up before down, have no order of their own: columns
of the products that make them and rows of those that read them may move together, since all that stands between is
element by element. Channels of attention and of the residual stream stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .graph import weight
from .quantize import constant_factor

# Operators that treat each channel alone, by itself or beside that of another value.
_ELEMENTWISE = {
    *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min"),
    *("Sigmoid", "Gelu", "Erf", "Tanh", "Relu", "Sqrt", "Exp", "Neg", "Softplus", "Elu", "LeakyRelu", "HardSwish"),
}


@dataclass(frozen=True)
class Makers:
    """What makes the channels of an activation: matrices by their products, and vectors of the operators between."""

    products: tuple[ir.Node, ...]
    vectors: tuple[tuple[ir.Node, int], ...]  # a node, and which of its inputs


def find_makers(activation: ir.Value, channels: int) -> Makers | None:
    """None where the channels are made otherwise, or something else reads a part of what makes them."""
    products: list[ir.Node] = []
    vectors: list[tuple[ir.Node, int]] = []
    inside: dict[int, ir.Node] = {}
    waiting = [activation.producer()]
    while waiting:
        node = waiting.pop()
        if node is None:
            return None
        if id(node) in inside:
            continue
        inside[id(node)] = node
        if node.op_type == "MatMul":
            if not _free_columns(node, channels):
                return None
            products.append(node)
            continue
        if node.op_type not in _ELEMENTWISE or len(node.outputs) != 1:
            return None
        for index, value in enumerate(node.inputs):
            array = weight(value)
            if array is None:
                waiting.append(None if value is None else value.producer())
            elif array.size == channels and array.shape[-1] == channels:
                vectors.append((node, index))
            elif array.size != 1:
                return None
    made = [value for node in inside.values() for value in node.outputs if value is not activation]
    if any(id(reader) not in inside for value in made for reader, _ in value.uses()):
        return None
    if len(products) == 0 or any(value.is_graph_output() for value in made):
        return None
    return Makers(tuple(products), tuple(vectors))


def _free_columns(product: ir.Node, channels: int) -> bool:
    """Whether a product makes so many channels, by a weight that nothing else reads."""
    factor, found = product.inputs[1], constant_factor(product)
    if factor is None or found is None or weight(factor) is None or len(tuple(factor.uses())) != 1:
        return False
    shape = found[0].shape
    return shape is not None and shape[-1] == channels


def by_size(rows: np.ndarray) -> np.ndarray:
    """The order (K,) of the channels of an activation, rows (N, K): those with the smallest extremes first."""
    return np.argsort(np.abs(rows).max(0), kind="stable")

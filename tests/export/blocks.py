"""The numbers of the blocks of a quantized graph, read from the graph itself."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]


def scales_of(model: ir.Model) -> dict[str, Array]:
    """Matrix -> its scales (N, blocks), as the graph computes them."""
    found: dict[str, Array] = {}
    gathered = ""
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            found[str(node.inputs[1].name).removesuffix(".blocks")] = computed(node.inputs[2])
        elif node.op_type == "Gather" and node.inputs[0].const_value is not None:
            gathered = str(node.inputs[0].name).removesuffix(".table")
        elif node.op_type == "Gather" and node.inputs[0].producer().op_type in ("Mul", "Split"):
            found[gathered] = computed(node.inputs[0])  # is after the gathered blocks
    return found


def computed(scales: ir.Value | None) -> Array:
    """Cast(codes) * factors, or the part of it that a Split gives."""
    node, rows = scales.producer(), slice(None)
    if node.op_type == "Split":
        ends = node.inputs[1].const_value.numpy().cumsum()
        rows = slice(*[0, *ends][scales.index() : scales.index() + 2])
        node = node.inputs[0].producer()
    codes, factors = node.inputs[0].producer().inputs[0], node.inputs[1]
    whole: Array = codes.const_value.numpy() * factors.const_value.numpy()
    return whole[rows]

"""Passes that replace torch's operators by onnxruntime's fused operators, for the fused graph. Each is exact.

    1. fuse_norms       x / sqrt(mean(x²) + e) * w               -> SimplifiedLayerNormalization (RMSNorm)
    2. fuse_skips       a + b, then that norm                    -> SkipSimplifiedLayerNormalization, outputs the sum
    3. fuse_rotary      q cos + rotate(q) sin before attention   -> GroupQueryAttention with do_rotary (rotary.py)
    4. drop_reshapes    heads split and joined again             -> removed

Operators that match no pattern stay unchanged. The graph is correct without any pass, and verified after all of them.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from .edit import CONTRIB_DOMAIN, input_of, producer, replace_node, replace_uses, replace_value, shape_of, weight
from .rotary import fuse_rotary


def fuse(model: ir.Model, context_length: int) -> None:
    """Runs the passes in order, on a graph that still has its shapes.

    `context_length` is the number of positions in the rotary tables.
    """
    drop_masks_of_ones(model)
    fuse_softplus(model)
    fuse_norms(model)
    fuse_skips(model)
    fuse_rotary(model, context_length)
    drop_reshapes(model)
    common.RemoveUnusedNodesPass()(model)


def where_rotated(model: ir.Model) -> str:
    """Describes how many attention calls of a fused graph rotate queries and keys themselves."""
    rotating = [
        node.attributes.get_int("do_rotary", 0) == 1 for node in model.graph if node.op_type == "GroupQueryAttention"
    ]
    if not any(rotating):
        return "rotary positions, if it has some, outside attention, as torch wrote them"
    return f"rotary positions inside attention in {sum(rotating)} of {len(rotating)} calls"


# --- recurrences --------------------------------------------------------------------------------------------------
def drop_masks_of_ones(model: ir.Model) -> None:
    """Removes products of rows with a mask (B, T, 1) that is 1 everywhere, which transformers applies to padding."""
    for node in tuple(model.graph):
        if node.op_type != "Mul" or node.outputs[0].is_graph_output():
            continue
        for rows, mask in (tuple(node.inputs), tuple(reversed(node.inputs))):
            start = mask
            while (step := None if start is None else start.producer()) and step.op_type in ("Cast", "Unsqueeze"):
                start = step.inputs[0]
            ones = weight(input_of(start, "Expand"))
            if rows is None or mask is None or ones is None or ones.tolist() != 1:
                continue
            if rows.shape is not None and mask.shape is not None and rows.shape[:2] == mask.shape[:2]:
                replace_uses(node.outputs[0], rows)
                break


def fuse_softplus(model: ir.Model) -> None:
    """Fuses torch's softplus, which passes large numbers on: where(x > 20, x, log(1 + exp(x)))."""
    for node in tuple(model.graph):
        if node.op_type != "Where" or producer(node.inputs[0], "Greater") is None:
            continue
        curved = node.inputs[2]
        softplus = producer(input_of(curved, "Div") or curved, "Softplus")
        scaled = None if softplus is None else producer(softplus.inputs[0], "Mul")
        if scaled is None or scaled.inputs[0] is not node.inputs[1]:
            continue
        beta = weight(scaled.inputs[1])
        if beta is not None and beta.tolist() == 1:
            replace_node(model, node, ir.node("Softplus", [node.inputs[1]], name=node.name))


# --- norms --------------------------------------------------------------------------------------------------------
def fuse_norms(model: ir.Model) -> None:
    """Fuses RMSNorm as torch writes it, with the weight on either side."""
    for node in tuple(model.graph):
        if node.op_type != "Mul" or len(node.inputs) != 2:
            continue
        scale, normed = weight_and_rest(node)
        if scale is None or normed is None:
            continue
        found = rms_normalised(normed)
        if found is None:
            continue
        x, epsilon = found
        new = ir.node(
            "SimplifiedLayerNormalization",
            [x, scale],
            {"axis": -1, "epsilon": epsilon, "stash_type": 1},
            name=node.name,
        )
        replace_node(model, node, new)


def weight_and_rest(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Returns the operand that is a vector of weights, and the other one."""
    for scale, rest in (tuple(node.inputs), tuple(reversed(node.inputs))):
        shape = shape_of(scale)
        if shape is not None and len(shape) == 1 and shape[0] > 1 and shape_of(rest) is None:
            return scale, rest
    return None, None


def rms_normalised(value: ir.Value) -> tuple[ir.Value, float] | None:
    """Returns (x, epsilon) of x * (1 / sqrt(mean(x ** 2, -1) + epsilon))."""
    product = producer(value, "Mul")
    if product is None:
        return None
    for x, inverse in (tuple(product.inputs), tuple(reversed(product.inputs))):
        root = input_of(input_of(inverse, "Reciprocal"), "Sqrt")
        total = producer(root, "Add")
        if total is None or x is None:
            continue
        mean, epsilon = (total.inputs[0], weight(total.inputs[1]))
        if epsilon is None or epsilon.size != 1:
            continue
        square = input_of(mean, "ReduceMean")
        reduced = producer(mean, "ReduceMean")
        power = producer(square, "Pow")
        if reduced is None or power is None or power.inputs[0] is not x:
            continue
        exponent, axes = weight(power.inputs[1]), weight(reduced.inputs[1]) if len(reduced.inputs) > 1 else None
        last = [-1] if x.shape is None else [-1, len(x.shape) - 1]
        if (
            exponent is not None
            and axes is not None
            and exponent.tolist() == 2
            and axes.tolist() in ([a] for a in last)
        ):
            return x, float(epsilon.item())
    return None


def fuse_skips(model: ir.Model) -> None:
    """Fuses the residual sum and the norm after it. The rest of the graph reads the sum as well."""
    for node in tuple(model.graph):
        if node.op_type != "SimplifiedLayerNormalization":
            continue
        total = producer(node.inputs[0], "Add")
        if total is None or any(value is None or shape_of(value) is not None for value in total.inputs):
            continue
        one, other = total.inputs
        assert one is not None
        assert other is not None
        if one.shape is None or one.shape != other.shape or len(one.shape) != 3 or total.outputs[0].is_graph_output():
            continue  # the operator needs (B, T, E) and, unlike Add, does not broadcast
        new = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*total.inputs, node.inputs[1]],
            {"epsilon": node.attributes["epsilon"].as_float()},
            domain=CONTRIB_DOMAIN,
            num_outputs=4,
            name=node.name,
        )
        for number, unused in enumerate(new.outputs[1:3]):
            unused.name = f"{node.name}_unused_{number}"
        model.graph.insert_before(total, new)  # other nodes may read the sum before the norm
        replace_value(model, node.outputs[0], new.outputs[0])
        replace_value(model, total.outputs[0], new.outputs[3])


# --- heads --------------------------------------------------------------------------------------------------------
def drop_reshapes(model: ir.Model) -> None:
    """Removes chains of Reshapes that end in the shape that they began with."""
    for node in tuple(model.graph):
        if node.op_type != "Reshape" or node.outputs[0].is_graph_output():
            continue
        shape, value = node.outputs[0].shape, node.inputs[0]
        while value is not None and shape is not None:
            if value.shape == shape:
                replace_uses(node.outputs[0], value)
                break
            value = input_of(value, "Reshape")

"""Rewrites operators, exactly, into forms that the compiler of Qualcomm's NPU, the HTP, accepts and computes right.

    1. write_norms        x / sqrt(mean(x²) + e) * w in the one form that the compiler makes an operator of: x² by Pow,
                          the weight second, at most three axes. With the weight first it fails
                          (QNN_COMMON_ERROR_MEM_ALLOC, 1002); of four axes and rows below 64 its numbers are wrong; in
                          any other form x² ends at the largest float16, so an x above 255 is lost
    2. gather_rows        GatherND of whole rows, as experts' weights are picked, becomes Gather: the HTP's GatherND
                          returns wrong rows when it picks more than some rows of several axes
    3. at_most_four_axes  operators that the HTP has for up to four axes only, such as Tanh, get their input reshaped

Found with graphs of one to seven operators on the emulated HTP of onnxruntime-qnn 2.7.0.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from ..edit import NodeBuilder, replace_node, sole_consumer
from ..fuse import rms_normalised, weight_and_rest

_NORM_AXES, _AXES = 3, 4
# They are elementwise. The HTP accepts others, such as Exp, Softmax and Add, with five axes as well.
_OF_FOUR_AXES = {
    "Atan", "Ceil", "Cos", "Elu", "Floor", "HardSigmoid", "HardSwish", "Log", "Mish", "Neg", "Round", "Selu", "Sign",
    "Sin", "Softplus", "Sqrt", "Tanh",
}  # fmt: skip


def suit_htp(model: ir.Model) -> None:
    """Runs the passes above on a graph whose sizes are numbers."""
    common.ShapeInferencePass()(model)
    write_norms(model)
    gather_rows(model)
    at_most_four_axes(model)


def write_norms(model: ir.Model) -> None:
    """Rewrites each RMS norm; one without a weight gets ones."""
    for node in tuple(model.graph):
        found = rms_normalised(node.outputs[0])
        if found is None or found[0].shape is None or not found[0].shape.is_static():
            continue
        x, epsilon = found
        sizes = found[0].shape.numpy()
        last, scale = node, None
        reader = sole_consumer(node.outputs[0])
        if reader is not None and reader.op_type == "Mul":
            scale, _ = weight_and_rest(reader)
            last = node if scale is None else reader
        builder = NodeBuilder(model, str(last.name))
        if scale is None:
            scale = builder.constant("weight", np.ones(sizes[-1], np.float32))
        if flattened := len(sizes) > _NORM_AXES:
            x = builder.add("Reshape", x, builder.constant("flat", np.array([1, math.prod(sizes[:-1]), sizes[-1]])))
        square = builder.add("Pow", x, builder.constant("two", np.array(2, np.float32)))
        mean = builder.add("ReduceMean", square, builder.constant("axes", np.array([-1])), keepdims=1)
        total = builder.add("Add", mean, builder.constant("epsilon", np.array(epsilon, np.float32)))
        inverse = builder.add("Reciprocal", builder.add("Sqrt", total))
        made = builder.add("Mul", builder.add("Mul", x, inverse), scale)
        if flattened:
            builder.add("Reshape", made, builder.constant("whole", np.array(sizes)))
        replace_node(model, last, *builder.nodes)
    common.RemoveUnusedNodesPass()(model)


def gather_rows(model: ir.Model) -> None:
    """Replaces each GatherND whose indices are one number each by Gather."""
    for node in tuple(model.graph):
        if node.op_type != "GatherND" or node.attributes.get_int("batch_dims", 0) != 0:
            continue
        rows, indices = node.inputs
        if indices is None or indices.shape is None or indices.shape[-1] != 1:
            continue
        builder = NodeBuilder(model, str(node.name))
        numbers = builder.add("Squeeze", indices, builder.constant("last", np.array([-1])))
        builder.add("Gather", rows, numbers)
        replace_node(model, node, *builder.nodes)


def at_most_four_axes(model: ir.Model) -> None:
    """Puts operators of more axes between two Reshapes. The first merges all axes but the last three."""
    for node in tuple(model.graph):
        shape = node.outputs[0].shape
        if node.op_type not in _OF_FOUR_AXES or shape is None or not shape.is_static() or len(shape) <= _AXES:
            continue
        sizes = shape.numpy()
        merged = (math.prod(sizes[: 1 - _AXES]), *sizes[1 - _AXES :])
        builder = NodeBuilder(model, str(node.name))
        flat = builder.add("Reshape", node.inputs[0], builder.constant("flat", np.array(merged)))
        made = builder.add(node.op_type, flat, **node.attributes)
        builder.add("Reshape", made, builder.constant("whole", np.array(sizes)))
        replace_node(model, node, *builder.nodes)

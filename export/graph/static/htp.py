"""Operators in forms that the compiler of Qualcomm's NPU, the HTP, takes. The numbers stay the same.

    1. weights_second     weight * x becomes x * weight: where x is what an RMS norm scales, the compiler makes one norm
                          of the whole, and with the weight in front it fails (QNN_COMMON_ERROR_MEM_ALLOC, 1002)
    2. at_most_four_axes  operators that the HTP takes of up to four axes only, such as Tanh, get their input reshaped

Both were found with graphs of one to seven operators on the emulated HTP of onnxruntime-qnn 2.7.0.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from ..edit import NodeBuilder, replace_node, weight

_AXES = 4
# They compute each number from one. Others, such as Exp, Softmax and Add, the HTP takes of five axes as well.
_OF_FOUR_AXES = {
    "Atan", "Ceil", "Cos", "Elu", "Floor", "HardSigmoid", "HardSwish", "Log", "Mish", "Neg", "Round", "Selu", "Sign",
    "Sin", "Softplus", "Sqrt", "Tanh",
}  # fmt: skip


def suit_htp(model: ir.Model) -> None:
    """Runs the passes above on a graph whose sizes are numbers."""
    weights_second(model)
    at_most_four_axes(model)


def weights_second(model: ir.Model) -> None:
    """Swaps the factors of a product whose first one is a weight."""
    for node in model.graph:
        first, second = node.inputs[:2] if node.op_type == "Mul" else (None, None)
        if weight(first) is not None:
            node.replace_input_with(0, second)
            node.replace_input_with(1, first)


def at_most_four_axes(model: ir.Model) -> None:
    """Puts operators of more axes between two Reshapes: the first one makes one axis of all but the last three."""
    common.ShapeInferencePass()(model)
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

"""Small graphs for tests, written in ONNX's text form, and their run."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .plain_loop import onnxruntime

Array = npt.NDArray[Any]


def model_of(text: str, **weights: Array) -> ir.Model:
    """A graph whose inputs of these names are initializers instead. Nodes have names, as in an exported one."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>\n{text}')
    for value in tuple(model.graph.inputs):
        if value.name in weights:
            model.graph.inputs.remove(value)
            value.const_value = ir.Tensor(weights[value.name], name=value.name)
            model.graph.register_initializer(value)
    for number, node in enumerate(model.graph):
        node.name = f"node_{number}"
    return model


def head_of(body: str, columns: int = 32) -> ir.Model:
    """A graph x (B, T, columns) -> logits (B, T, 40) with the weights w (columns, 40), e (40, columns) and b (40,)."""
    rng = np.random.default_rng(0)
    sizes = {"w": (columns, 40), "e": (40, columns), "b": (40,)}
    declared = "".join(f", float[{','.join(map(str, size))}] {name}" for name, size in sizes.items())
    return model_of(
        f"g (float[batch_size,sequence_length,{columns}] x{declared})"
        f" => (float[batch_size,sequence_length,40] logits) {{ {body} }}",
        **{name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()},
    )


def run_model(model: ir.Model, **feeds: Array) -> list[Array]:
    """Its outputs, in order. Inputs that the graph does not have are left out."""
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    known = {value.name for value in session.get_inputs()}
    found: list[Array] = session.run(None, {name: np.asarray(array) for name, array in feeds.items() if name in known})
    return found

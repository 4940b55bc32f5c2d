"""A graph of a few nodes, as a model that onnxruntime runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir

from pastkey.export.generation.nodes import Nodes, typed
from pastkey.runtime.providers.ort import onnxruntime

INT64, FLOAT, BOOL, DOUBLE = ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.BOOL, ir.DataType.DOUBLE


def run(inputs: Mapping[str, tuple[Any, Any]], build: Callable[..., ir.Value], dtype: Any) -> Callable[..., Any]:
    """A function of arrays by name, which gives the one output that `build` makes of the inputs."""
    given = {name: typed(name, *kind) for name, kind in inputs.items()}
    graph = ir.Graph([*given.values()], [], nodes=[], opset_imports={"": 20}, name="small")
    model = ir.Model(graph, ir_version=10)
    nodes = Nodes(model, "small")
    output = nodes.add("Identity", build(nodes, given))
    output.name, output.type = "output", ir.TensorType(dtype)
    graph.extend(nodes.nodes)
    graph.outputs.append(output)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    used = {value.name for value in session.get_inputs()}

    def call(**arrays: Any) -> Any:
        return session.run(None, {name: array for name, array in arrays.items() if name in used})[0]

    return call

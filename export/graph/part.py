"""A part of a graph cut out and run: what does not depend on the text is known before there is one."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from pastkey.runtime.providers.ort import onnxruntime

from .edit import weight


def depends_only_on(model: ir.Model, sources: Iterable[ir.Value]) -> set[int]:
    """The identities of the `sources` and of all values that are made of them, and of nothing but constants beside."""
    found = {id(source) for source in sources}
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        if any(id(v) in found for v in inputs) and all(id(v) in found or constant(v) for v in inputs):
            found |= {id(value) for value in node.outputs}
    return found


def constant(value: ir.Value) -> bool:
    """An initializer, or computed of nothing else."""
    if weight(value) is not None:
        return True
    producer = value.producer()
    return producer is not None and all(constant(v) for v in producer.inputs if v is not None)


class Part:
    """What makes `value`, which depends on `source` alone. Shapes that were inferred play no role."""

    def __init__(self, model: ir.Model, value: ir.Value, source: ir.Value) -> None:
        graph = ir.convenience.extract(model.graph, [source], [value]).clone()
        (given,), (wanted,) = graph.inputs, graph.outputs
        wanted.shape = None
        for node in graph:
            for output in node.outputs:
                output.shape = None
        for held in graph.initializers.values():  # those of a file are brought along
            assert held.const_value is not None
            held.const_value = ir.Tensor(held.const_value.numpy(), name=held.name)
        content = ir.to_proto(ir.Model(graph, ir_version=model.ir_version)).SerializeToString()
        self._name = str(given.name)
        self._session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(self, fed: np.ndarray) -> np.ndarray:
        """The value where the source is `fed`, of the shape and type that the graph says."""
        (found,) = self._session.run(None, {self._name: fed})
        return np.asarray(found)

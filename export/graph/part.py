"""Cuts a part out of a graph and runs it: values that do not depend on the text are computed at export."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from .edit import shape_of
from .session import cpu_session


def depends_only_on(model: ir.Model, sources: Iterable[ir.Value]) -> set[int]:
    """Returns the identities of the `sources` and of all values that depend only on them and on constants."""
    found = {id(source) for source in sources}
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        if any(id(v) in found for v in inputs) and all(id(v) in found or constant(v) for v in inputs):
            found |= {id(value) for value in node.outputs}
    return found


def constant(value: ir.Value) -> bool:
    """Whether the value is an initializer, or computed only from initializers."""
    if shape_of(value) is not None:
        return True
    producer = value.producer()
    return producer is not None and all(constant(v) for v in producer.inputs if v is not None)


class Subgraph:
    """The part of a graph that computes `value` from only `source`. Ignores inferred shapes."""

    def __init__(self, model: ir.Model, value: ir.Value, source: ir.Value) -> None:
        self._name, self._session = str(source.name), _opened(model, [value], [source])

    def run(self, fed: np.ndarray) -> np.ndarray:
        """Returns the value for the source `fed`, of the shape and type in the graph."""
        (found,) = self._session.run(None, {self._name: fed})
        return np.asarray(found)


def evaluate(model: ir.Model, values: Sequence[ir.Value], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Returns values that depend on no other inputs than those in `feeds`, by running the part that makes them."""
    session = _opened(model, values, [value for value in model.graph.inputs if value.name in feeds])
    return list(session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()}))


def _opened(model: ir.Model, values: Sequence[ir.Value], sources: Sequence[ir.Value]) -> Any:
    """Returns a session of the part of a graph that computes the values from the sources."""
    graph = ir.convenience.extract(model.graph, sources, values).clone()
    graph.inputs[:] = [value for value in graph.inputs if value.uses()]
    for value in (*graph.outputs, *(output for node in graph for output in node.outputs)):
        value.shape = None
    for held in graph.initializers.values():  # external data is read into the part
        assert held.const_value is not None
        held.const_value = ir.Tensor(held.const_value.numpy(), name=held.name)
    return cpu_session(ir.to_proto(ir.Model(graph, ir_version=model.ir_version)).SerializeToString())

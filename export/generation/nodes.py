"""Builds the nodes of the generation graphs: constants, branches, checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from ..graph.edit import NodeBuilder

Made = Callable[["Nodes"], ir.Value]


class Nodes(NodeBuilder):
    """Nodes of one graph or of one branch. Constants are in the outermost graph, where every branch can read them."""

    def __init__(self, model: ir.Model, name: str) -> None:
        super().__init__(model, name)
        self._whole = model
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._parts = 0

    def number(self, content: Any, dtype: type[np.generic] = np.int64) -> ir.Value:
        """A constant: () for a number, (N,) for a list."""
        array = np.array(content, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.constant(f"constant_{len(self._constants)}", array)
        return self._constants[key]

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.add("Cast", value, to=int(dtype))

    def scalar(self, value: ir.Value) -> ir.Value:
        """Squeezes (1,) to ()."""
        return self.add("Squeeze", value, self.number([0]))

    def filled(self, shape: ir.Value, content: Any, dtype: type[np.generic]) -> ir.Value:
        """A tensor filled with one number; `shape` is (R,) int64."""
        return self.add("ConstantOfShape", shape, value=ir.tensor(np.array([content], dtype)))

    def as_int(self, condition: ir.Value) -> ir.Value:
        """int64: 1 where the condition holds, else 0."""
        return self.cast(condition, ir.DataType.INT64)

    def between(self, value: ir.Value, least: ir.Value, most: ir.Value) -> ir.Value:
        return self.add("And", self.add("GreaterOrEqual", value, least), self.add("LessOrEqual", value, most))

    def gathered(self, table: np.ndarray, places: ir.Value) -> ir.Value:
        """Gathers rows of a constant table."""
        return self.add("Gather", self.number(table.tolist(), table.dtype.type), places, axis=0)

    def shifted(self, row: ir.Value, places: int, filling: int) -> ir.Value:
        """Shifts a row (N,) by `places` to the right and fills the start with `filling`."""
        longer = self.add("Concat", self.number([filling] * places), row, axis=0)
        return self.add("Slice", longer, self.number([0]), self.add("Shape", row))

    def branch(self, condition: ir.Value, then: Made, otherwise: Made, of: ir.Value) -> ir.Value:
        """If the condition () holds, returns the result of `then`, else of `otherwise`, typed as `of`."""
        graphs = [self._part(made, of) for made in (then, otherwise)]
        chosen = self.add("If", condition, then_branch=graphs[0], else_branch=graphs[1])
        chosen.type, chosen.shape = of.type, of.shape
        return chosen

    def _part(self, made: Made, of: ir.Value) -> ir.Graph:
        self._parts += 1
        inner = Nodes(self._whole, f"{self._name}_{len(self.nodes)}_{self._parts}")
        result = inner.add("Identity", made(inner))  # a branch may return its input
        result.type, result.shape = of.type, of.shape
        return ir.Graph([], [result], nodes=inner.nodes, name=inner._name)

    def require(self, condition: ir.Value, sentence: str) -> ir.Value:
        """Returns (1,) int64 zero, or fails the run with an error that names the node: the sentence.

        The condition is (1,). Every execution provider rejects a Reshape to an impossible size.
        """
        wrong = self.cast(self.add("Not", condition), ir.DataType.INT64)
        checked = self.add("Reshape", self.number([0]), self.add("Add", wrong, self.number([1])))
        node = checked.producer()
        assert node is not None
        node.name = sentence
        return checked


def typed(name: str, dtype: ir.DataType, shape: list[int | str | None]) -> ir.Value:
    """An input of a graph."""
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))

"""The matrices of a float32 graph, without reading them for their shapes, and weights that are made when written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...graph.edit import add_tensor, shape_of, steering, weight

_MARK = "pastkey.weights"  # key in a node's metadata


class MatMulWeight(NamedTuple):
    """The weight of a MatMul or Gemm: an initializer of shape (N, K), or (K, N) if `transposed`."""

    initializer: ir.Value
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K)."""
        shape = shape_of(self.initializer)
        assert shape is not None
        return shape[::-1] if self.transposed else shape

    @property
    def matrix(self) -> np.ndarray:
        """(N, K) float32: one row per output."""
        array = weight(self.initializer)
        assert array is not None
        return array.T if self.transposed else array


def matmul_weight(node: ir.Node) -> MatMulWeight | None:
    """Returns the weight (float32, two axes) that a node multiplies by; None for any other node."""
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    value, transposed = node.inputs[1], True
    if node.op_type == "Gemm":
        plain = _number(node, "alpha", 1.0) == 1 and _number(node, "beta", 1.0) == 1 and not _number(node, "transA", 0)
        if not plain:
            return None
        transposed = not _number(node, "transB", 0)
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Transpose":
        value, transposed = producer.inputs[0], not transposed
    return None if value is None or not _is_matrix(value) else MatMulWeight(value, transposed)


def steering_weights(model: ir.Model) -> set[str]:
    """Names of the matrices that compute nothing but the decay or the beta of recurrences.

    They are small, and their error adds up over the text, as it is multiplied into the state at each token.
    """
    steps, found = steering(model), set[str]()
    for node in model.graph:
        read, uses = matmul_weight(node), node.outputs[0].uses()
        if read is not None and uses and all(user in steps for user, _ in uses):
            found.add(str(read.initializer.name))
    return found


def mark_weights(node: ir.Node, weights: Sequence[MatMulWeight]) -> None:
    """Writes into a node which float32 matrices its quantized one was made of, until `take_weights`."""
    columns = weights[0].shape[1]
    node.metadata_props[_MARK] = json.dumps([columns, [(read.initializer.name, read.shape[0]) for read in weights]])


def take_weights(node: ir.Node) -> tuple[int, list[tuple[str, int]]] | None:
    """Returns K, and the name and N of each matrix that a node multiplies by, or None. Removes the mark."""
    if (marked := node.metadata_props.pop(_MARK, None)) is not None:
        columns, weights = json.loads(marked)
        return columns, [(name, rows) for name, rows in weights]
    read = matmul_weight(node)
    return None if read is None else (read.shape[1], [(str(read.initializer.name), read.shape[0])])


def embedding_weight(node: ir.Node) -> ir.Value | None:
    """Returns the initializer (V, K) float32 whose rows a node gathers; None for any other node."""
    if node.op_type != "Gather" or _number(node, "axis", 0) != 0:
        return None
    return node.inputs[0] if _is_matrix(node.inputs[0]) else None


def _is_matrix(value: ir.Value | None) -> bool:
    if value is None or value.const_value is None:
        return False
    return len(shape_of(value) or ()) == 2 and value.const_value.dtype == ir.DataType.FLOAT


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


def lazy(name: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> ir.LazyTensor:
    """Returns a tensor whose content `make` returns, each time that it is read: one matrix at a time is in memory."""
    return ir.LazyTensor(lambda: ir.Tensor(make(), dtype, name=name), dtype, ir.Shape(shape), name=name)


def add_lazy_weight(
    model: ir.Model, name: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], np.ndarray]
) -> ir.Value:
    """As `add_weight`, for an array that `make` returns when the graph is written."""
    return add_tensor(model, name, lazy(name, dtype, shape, make))

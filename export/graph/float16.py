"""Converts a float32 graph to float16: weights, activations and cache. Logits stay in float32.

Values that need more than 11 bits, or overflow at 65,504, stay in float32: the angles of rotary positions, and the sums
of squares in a norm that torch wrote in small operators. onnxruntime's own conversion needs the types of intermediate
values, which files do not hold. So this pass infers the types operator by operator.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pastkey.contract import names
from pastkey.errors import ContractError

from .edit import STATEFUL, add_weight, steering, weight

_ANGLES = {"Cos", "Sin"}
_SUMS = {"ReduceMean", "ReduceSum"}
_BOOL = {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not", "Xor", "IsNaN", "IsInf"}
_INT64 = {"Shape", "Size", "ArgMax", "ArgMin", "NonZero"}
_NOT_BESIDE = {"GRU", "LSTM", "RNN"}  # onnxruntime 1.32 optimizes such a graph and crashes
_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


LARGEST = float(np.finfo(np.float16).max)


def to_float16(model: ir.Model) -> list[str]:
    """Rewrites a graph in place. Reads weights from external data.

    Returns the names of the values that operators now output in float16. Raises ContractError for a graph that
    onnxruntime cannot load then.
    """
    if found := {node.op_type for node in model.graph} & _NOT_BESIDE:
        told = ", ".join(sorted(found))
        raise ContractError(
            f"a graph with {told} ends onnxruntime's process if its other weights are float16: export with --precision "
            "int8, or fp32"
        )
    return _Halved(model).rewrite()


class _Halved:
    """One graph during its conversion."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._kept = _kept_in_float32(model)
        self._types: dict[int, ir.DataType | None] = {}  # the current type of each value, by its identity
        self._weights: dict[tuple[int, ir.DataType], ir.Value] = {}
        self._casts: dict[tuple[int, ir.DataType], ir.Value] = {}

    def rewrite(self) -> list[str]:
        graph, halved = self._model.graph, list[str]()
        for value in graph.inputs:
            if value.dtype == _FLOAT and not names.is_state(str(value.name)):
                value.type = ir.TensorType(_HALF)
            self._types[id(value)] = value.dtype
        for value in graph.initializers.values():
            self._types[id(value)] = None if value.const_value is None else value.const_value.dtype
        for node in tuple(graph):
            wanted = _FLOAT if node in self._kept else _HALF
            for place, read in enumerate(node.inputs):
                if read is not None and self._types[id(read)] in (_FLOAT, _HALF):
                    node.replace_input_with(place, self._as(read, wanted, node))
            for inner, place, read in _captured(node):
                if self._types.get(id(read)) == _HALF:
                    inner.replace_input_with(place, self._as(read, _FLOAT, node))
            if wanted == _HALF:
                _halve_attributes(node)
            given = self._given(node)
            if wanted == _HALF and given in (_FLOAT, _HALF):
                halved.append(str(node.outputs[0].name))
            for output in node.outputs:
                self._types[id(output)] = wanted if given in (_FLOAT, _HALF) else given
                if not output.is_graph_output():  # files hold no inner types; some outputs of a norm are always float32
                    output.type = output.shape = None
        for place, output in enumerate(tuple(graph.outputs)):
            self._put_out(place, output)
        for name, value in tuple(graph.initializers.items()):
            if not value.uses():
                del graph.initializers[name]
        return halved

    def _given(self, node: ir.Node) -> ir.DataType | None:
        """Returns the type of a node's output."""
        if node.op_type in _BOOL:
            return ir.DataType.BOOL
        if node.op_type in _INT64:
            return ir.DataType.INT64
        if node.op_type == "Cast":
            return ir.DataType(node.attributes.get_int("to", _FLOAT))
        if node.op_type in ("Constant", "ConstantOfShape"):
            tensor = node.attributes.get("value")
            integers = any(name.startswith("value_int") for name in node.attributes)
            return tensor.as_tensor().dtype if tensor is not None else ir.DataType.INT64 if integers else _FLOAT
        value = node.inputs[1 if node.op_type == "Where" else 0]
        return None if value is None else self._types[id(value)]

    def _as(self, value: ir.Value, wanted: ir.DataType, reader: ir.Node) -> ir.Value:
        """Returns the value in the type `wanted`, for a node that reads it."""
        if value.const_value is not None and value.producer() is None:
            return self._weight(value, wanted)
        if self._types[id(value)] == wanted:
            return value
        if (id(value), wanted) not in self._casts:
            cast = self._cast(value, wanted)
            self._model.graph.insert_before(reader, [cast])
            self._casts[id(value), wanted] = cast.outputs[0]
        return self._casts[id(value), wanted]

    def _weight(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        if wanted == _FLOAT:
            return value
        if (id(value), wanted) not in self._weights:
            assert value.const_value is not None
            new = add_weight(self._model, f"{value.name}.float16", _half(value.const_value.numpy()))
            self._types[id(new)] = wanted
            self._weights[id(value), wanted] = new
        return self._weights[id(value), wanted]

    def _cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Node:
        node = ir.node("Cast", [value], {"to": wanted}, name=f"{value.name}_to_{wanted.name.lower()}")
        node.outputs[0].name = f"{node.name}_output"
        self._types[id(node.outputs[0])] = wanted
        return node

    def _put_out(self, place: int, value: ir.Value) -> None:
        """Sets the type of a graph output: float32 for logits and states, float16 for everything else."""
        wanted = _FLOAT if value.name == names.LOGITS or names.is_state(str(value.name)) else _HALF
        producer, name = value.producer(), value.name
        if self._types[id(value)] != wanted and producer is not None:
            shape, value.shape, value.type = value.shape, None, None
            value.name = f"{name}_as_computed"
            cast = self._cast(value, wanted)
            self._model.graph.insert_after(producer, [cast])
            new = cast.outputs[0]
            new.name, new.shape = name, shape
            self._model.graph.outputs[place] = value = new
        value.type = ir.TensorType(wanted)


def _kept_in_float32(model: ir.Model) -> set[ir.Node]:
    """Returns the nodes that compute angles, keep states, and are between a square and the inverse of its root."""
    kept = steering(model)
    for node in model.graph:
        if node.op_type in _ANGLES:
            _keep(node, kept)
        elif node.op_type in STATEFUL:
            kept.add(node)
        elif node.op_type == "Sqrt" or _is_inverse_root(node):
            kept.add(node)
            kept.update(user for user, _ in node.outputs[0].uses() if user.op_type == "Reciprocal")
            for value in node.inputs:
                producer = None if value is None else value.producer()
                if producer is not None and producer.op_type in {"Add"} | _SUMS:
                    _keep(producer, kept, to_squares=True)
    return kept


def _captured(node: ir.Node) -> list[tuple[ir.Node, int, ir.Value]]:
    """The values that a Scan's body, which stays in float32, reads of the graph: (its node, which input, value)."""
    bodies = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    nodes = [inner for body in bodies for inner in body]
    return [(inner, i, value) for inner in nodes for i, value in enumerate(inner.inputs) if value is not None]


def _is_inverse_root(node: ir.Node) -> bool:
    """Whether the node raises x to a constant power below 1, such as -0.5 in a norm."""
    exponent = weight(node.inputs[1]) if node.op_type == "Pow" else None
    return exponent is not None and exponent.size == 1 and float(exponent.reshape(())) < 1


def _keep(node: ir.Node, kept: set[ir.Node], *, to_squares: bool = False) -> None:
    """Adds a node and its predecessors to `kept`: all of them, or back to the squares."""
    kept.add(node)
    for value in node.inputs:
        producer = None if value is None else value.producer()
        if producer is None or producer in kept or (to_squares and node.op_type not in {"Add"} | _SUMS):
            continue
        _keep(producer, kept, to_squares=to_squares)


def _halve_attributes(node: ir.Node) -> None:
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) == _FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", _HALF)
    tensor = node.attributes.get("value")
    if node.op_type in ("Constant", "ConstantOfShape") and tensor is not None and tensor.as_tensor().dtype == _FLOAT:
        node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(_half(tensor.as_tensor().numpy())))


def _half(array: np.ndarray) -> np.ndarray:
    """Keeps finite values finite: the lowest float32 in a mask becomes the lowest float16."""
    return np.where(np.isfinite(array), array.clip(-LARGEST, LARGEST), array).astype(np.float16)

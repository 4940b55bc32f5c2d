"""A graph with an input that selects float32 or int8 for each matrix, so that one session runs every mixture.

MatMuls compute some of their rows in each precision. The switch is the number of int8 rows: none or all of them. So a
mixture costs only what its MatMuls cost, and its results equal those of a separate graph:

    1. MatMul or Gemm(x, W)   -> Concat(int8 of x[..., :switch, :], float32 of x[..., switch:, :])
    2. Gather(E, ids)         -> Where(switch, int8, float32): cheap enough to compute both
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...graph.blocks import Blocks
from ...graph.edit import NodeBuilder, add_weight, replace_node, shape_of
from ...graph.write.output_head import output_head
from ..rounding.matrices import embedding_weight, matmul_weight
from ..rounding.rewrite import NONE_ROUNDED, quantize

SWITCHES = "int8_switches"  # the input, a quantization mask (matrices,) int64: the number of int8 rows of each MatMul
_ALL = np.iinfo(np.int64).max
_ROW_AXIS = -2


@dataclass
class Matrix:
    """An initializer that `quantize` makes int8."""

    weight: str  # its name
    shape: tuple[int, ...]
    bytes: int  # in float32
    matmul: bool = False  # whether a MatMul reads it; a tied embedding is also gathered


def quantization_mask(matrices: Iterable[Matrix], int8: Iterable[str]) -> np.ndarray:
    """(matrices,) int64: the input that selects int8 for the named weights and float32 for the others."""
    chosen = frozenset(int8)
    return np.array([_ALL if matrix.weight in chosen else 0 for matrix in matrices], np.int64)


def add_switches(model: ir.Model, rounded: Mapping[str, Blocks] = NONE_ROUNDED) -> tuple[Matrix, ...]:
    """Adds the input SWITCHES to a float32 graph. Returns its matrices, in the order of their switches.

    Matrices of `rounded`, by initializer name, replace int8. Nodes that share an initializer share its switch. Raises
    InputError on NaN or infinity.
    """
    head = output_head(model)
    originals = frozenset(model.graph.initializers)
    switched, int8_head = _Switched(model), None
    for node in tuple(model.graph):
        embedding, read = embedding_weight(node), matmul_weight(node)
        if embedding is not None:
            switched.gather(node, embedding)
        elif read is not None:
            int8 = switched.matmul(node, read.initializer)
            int8_head = int8 if node is head else int8_head
    switches_input = switched.input
    switches_input.shape = ir.Shape((len(switched.matrices),))
    model.graph.inputs.append(switches_input)
    quantize(model, originals, int8_head, {_copy(name): matrix for name, matrix in rounded.items()})
    return tuple(switched.matrices.values())


def _copy(name: str) -> str:
    """Returns the name of an initializer's quantized copy."""
    return f"{name}.int8"


class _Switched:
    """The graph, and the parts that its nodes share: the switches, and quantized copies of initializers."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self.input = ir.Value(name=SWITCHES, type=ir.TensorType(ir.DataType.INT64))
        self.matrices: dict[str, Matrix] = {}
        self._copies: dict[str, ir.Value] = {}  # what `quantize` changes: the same arrays by other names
        self._constants: dict[int, ir.Value] = {}

    def matmul(self, node: ir.Node, value: ir.Value) -> ir.Node:
        """Applies rule 1. Returns the MatMul or Gemm that becomes int8."""
        number, copy = self._matrix(value, matmul=True)
        x, builder = node.inputs[0], NodeBuilder(self._model, f"{node.name}_switched")
        end = builder.add("Gather", self.input, self._constant(number))
        zero, most, axis = (self._constant(n) for n in (0, _ALL, _ROW_AXIS))
        first, rest = builder.add("Slice", x, zero, end, axis), builder.add("Slice", x, end, most, axis)
        if node.inputs[1] is not value:
            transposing = node.inputs[1].producer() if node.inputs[1] is not None else None
            assert transposing is not None
            copy = builder.add("Transpose", copy, **transposing.attributes)
        int8 = builder.add(node.op_type, first, copy, *node.inputs[2:], **node.attributes)
        made = int8.producer()
        assert made is not None
        float32 = builder.add(node.op_type, rest, *node.inputs[1:], **node.attributes)
        builder.add("Concat", int8, float32, axis=_ROW_AXIS)
        replace_node(self._model, node, *builder.nodes)
        return made

    def gather(self, node: ir.Node, embedding: ir.Value) -> None:
        """Applies rule 2."""
        number, copy = self._matrix(embedding)
        builder, indices = NodeBuilder(self._model, f"{node.name}_switched"), node.inputs[1]
        chosen = builder.add("Cast", builder.add("Gather", self.input, self._constant(number)), to=ir.DataType.BOOL)
        builder.add("Where", chosen, builder.add("Gather", copy, indices), builder.add("Gather", embedding, indices))
        replace_node(self._model, node, *builder.nodes)

    def _matrix(self, value: ir.Value, *, matmul: bool = False) -> tuple[int, ir.Value]:
        """Returns the switch's number, and the initializer that becomes int8."""
        name, shape = str(value.name), shape_of(value)
        assert shape is not None
        matrix = self.matrices.setdefault(name, Matrix(name, shape, 4 * math.prod(shape)))
        matrix.matmul |= matmul
        if name not in self._copies:
            copy = ir.Value(name=_copy(name), shape=value.shape, type=value.type, const_value=value.const_value)
            self._model.graph.register_initializer(copy)
            self._copies[name] = copy
        return list(self.matrices).index(name), self._copies[name]

    def _constant(self, number: int) -> ir.Value:
        """Returns a constant (1,) int64."""
        if number not in self._constants:
            self._constants[number] = add_weight(self._model, f"{SWITCHES}.constant_{number}", np.array([number]))
        return self._constants[number]

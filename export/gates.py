"""A graph in which each matrix is float32 or quantized by an input, so that one session runs every mixture of the two.

Products compute some of their rows in each precision, and the gate says where the one ends: at none or at all of them.
So a mixture costs what its products cost, and is exactly what a graph of its own would give:

    1. MatMul or Gemm(x, W)   -> Concat(int8 of x[..., :gate, :], float32 of x[..., gate:, :])
    2. Gather(E, ids)         -> Where(gate, int8, float32): cheap enough to do both
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pastkey import names

from .gptq import FourBit
from .graph import Steps, add_weight, replace_node, weight
from .last_position import output_head
from .quantize import constant_factor, gathered_table, quantize

GATES = "int8_gates"  # (matrices,) int64: how many rows of each product are int8
_ALL = np.iinfo(np.int64).max
_ROW_AXIS = -2


@dataclass
class Matrix:
    """An initializer that `quantize` makes int8."""

    weight: str  # its name
    shape: tuple[int, ...]
    bytes: int  # in float32
    product: bool = False  # multiplied by; a tied table is gathered too


def gates(matrices: Iterable[Matrix], int8: Iterable[str]) -> np.ndarray:
    """(matrices,) int64: the input that makes int8 of the weights that are named, and float32 of the others."""
    chosen = frozenset(int8)
    return np.array([_ALL if matrix.weight in chosen else 0 for matrix in matrices], np.int64)


_NONE: Mapping[str, FourBit] = {}


def add_gates(model: ir.Model, int4: Mapping[str, FourBit] = _NONE) -> tuple[Matrix, ...]:
    """Adds the input GATES to a float32 graph. Returns its matrices, in the order of the gates.

    Matrices of `int4`, by the names of initializers, are 4-bit where others are int8. Nodes that share an initializer
    share its gate. Raises InputError on NaN or infinity.
    """
    head = next((output_head(value) for value in model.graph.outputs if value.name == names.LOGITS), None)
    originals = frozenset(model.graph.initializers)
    gated, int8_head = _Gated(model), None
    for node in tuple(model.graph):
        table, factor = gathered_table(node), constant_factor(node)
        if table is not None:
            gated.gather(node, table)
        elif factor is not None:
            int8 = gated.product(node, factor[0])
            int8_head = int8 if node is head else int8_head
    gates_input = gated.input
    gates_input.shape = ir.Shape((len(gated.matrices),))
    model.graph.inputs.append(gates_input)
    quantize(model, originals, int8_head, {_copy(name): matrix for name, matrix in int4.items()})
    return tuple(gated.matrices.values())


def _copy(name: str) -> str:
    """What an initializer's quantized twin is called."""
    return f"{name}.int8"


class _Gated:
    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self.input = ir.Value(name=GATES, type=ir.TensorType(ir.DataType.INT64))
        self.matrices: dict[str, Matrix] = {}
        self._copies: dict[str, ir.Value] = {}  # what `quantize` is to take instead: the same array by another name
        self._constants: dict[int, ir.Value] = {}

    def product(self, node: ir.Node, factor: ir.Value) -> ir.Node:
        """Rule 1. Returns the product that is to be int8."""
        number, copy = self._matrix(factor, product=True)
        x, steps = node.inputs[0], Steps(self._model, f"{node.name}_gated")
        end = steps.add("Gather", self.input, self._constant(number))
        zero, most, axis = (self._constant(n) for n in (0, _ALL, _ROW_AXIS))
        first, rest = steps.add("Slice", x, zero, end, axis), steps.add("Slice", x, end, most, axis)
        if node.inputs[1] is not factor:
            transposing = node.inputs[1].producer() if node.inputs[1] is not None else None
            assert transposing is not None
            copy = steps.add("Transpose", copy, **transposing.attributes)
        int8 = steps.add(node.op_type, first, copy, *node.inputs[2:], **node.attributes)
        made = int8.producer()
        assert made is not None
        exact = steps.add(node.op_type, rest, *node.inputs[1:], **node.attributes)
        steps.add("Concat", int8, exact, axis=_ROW_AXIS)
        replace_node(self._model, node, *steps.nodes)
        return made

    def gather(self, node: ir.Node, table: ir.Value) -> None:
        """Rule 2."""
        number, copy = self._matrix(table)
        steps, indices = Steps(self._model, f"{node.name}_gated"), node.inputs[1]
        chosen = steps.add("Cast", steps.add("Gather", self.input, self._constant(number)), to=ir.DataType.BOOL)
        steps.add("Where", chosen, steps.add("Gather", copy, indices), steps.add("Gather", table, indices))
        replace_node(self._model, node, *steps.nodes)

    def _matrix(self, value: ir.Value, *, product: bool = False) -> tuple[int, ir.Value]:
        """The gate's number, and the initializer that becomes int8."""
        name, array = str(value.name), weight(value)
        assert array is not None
        matrix = self.matrices.setdefault(name, Matrix(name, array.shape, array.nbytes))
        matrix.product |= product
        if name not in self._copies:
            copy = ir.Value(name=_copy(name), shape=value.shape, type=value.type, const_value=value.const_value)
            self._model.graph.register_initializer(copy)
            self._copies[name] = copy
        return list(self.matrices).index(name), self._copies[name]

    def _constant(self, number: int) -> ir.Value:
        """(1,) int64."""
        if number not in self._constants:
            self._constants[number] = add_weight(self._model, f"{GATES}.constant_{number}", np.array([number]))
        return self._constants[number]

"""The tables of scales and offsets that `rounding.rewrite` computes for many matrices at once, row by row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..edit import NodeBuilder, add_tensor, input_of, producer, replace_node, shape_of, weight


@dataclass(frozen=True)
class TableRows:
    """Rows of a table that `rounding.rewrite` computes of scales or offsets: codes times factors, or only factors."""

    codes: ir.Value | None
    factors: ir.Value
    first: int
    rows: int

    def take(self, model: ir.Model) -> tuple[ir.Value | None, ir.Value]:
        """The initializers of only these rows, over the same bytes."""
        codes = None if self.codes is None else _rows_of(model, self.codes, self.first, self.rows)
        return codes, _rows_of(model, self.factors, self.first, self.rows)

    def computed(self, model: ir.Model, builder: NodeBuilder, indices: ir.Value | None = None) -> ir.Value:
        """Builds the nodes of these rows, or of those that `indices` (B, T) gathers."""
        codes, factors = self.take(model)
        shape = shape_of(codes) or shape_of(factors)
        assert shape is not None
        if indices is not None:
            codes = None if codes is None else builder.add("Gather", codes, indices, axis=0)
            factors = builder.add("Gather", factors, indices, axis=0)
        if codes is not None:
            whole = builder.add("Mul", builder.add("Cast", codes, to=ir.DataType.FLOAT), factors)
            if len(shape) == 2:
                return whole
            sizes = builder.constant("sizes", np.array([*([0] if indices is None else []), math.prod(shape[1:])]))
            if indices is not None:
                sizes = builder.add("Concat", builder.add("Shape", indices), sizes, axis=0)
            return builder.add("Reshape", whole, sizes)
        return (
            factors if self.factors.dtype is ir.DataType.FLOAT else builder.add("Cast", factors, to=ir.DataType.FLOAT)
        )


def table_rows(value: ir.Value | None) -> TableRows | None:
    """The parts of a value that `rounding.rewrite` computes, or None for any other."""
    first, rows = 0, None
    if value is not None and (split := producer(value, "Split")) is not None:
        sizes = weight(split.inputs[1]) if len(split.inputs) > 1 else None
        if sizes is None:
            return None
        place = list(split.outputs).index(value)
        first, rows = int(sizes[:place].sum()), int(sizes[place])
        value = split.inputs[0]
    value = input_of(value, "Reshape") or value
    product, codes = producer(value, "Mul"), None
    if product is not None:
        codes, value = input_of(product.inputs[0], "Cast"), product.inputs[1]
    shape = shape_of(value := input_of(value, "Cast") or value)
    if value is None or shape is None or (product is not None and shape_of(codes) is None):
        return None
    return TableRows(codes, value, first, shape[0] if rows is None else rows)


def _rows_of(model: ir.Model, value: ir.Value, first: int, rows: int) -> ir.Value:
    """Rows of an initializer as a separate one, over the same bytes of the weights file."""
    tensor = value.const_value
    assert tensor is not None
    shape = tensor.shape.numpy()
    if rows == shape[0]:
        return value
    name = f"{value.name}.{first}"
    if (known := model.graph.initializers.get(name)) is not None:
        return known
    if not isinstance(tensor, ir.ExternalTensor):
        return add_tensor(model, name, ir.Tensor(tensor.numpy()[first : first + rows].copy()))
    size = math.prod(shape[1:]) * tensor.dtype.itemsize
    part = ir.ExternalTensor(
        tensor.location,
        (tensor.offset or 0) + first * int(size),
        rows * int(size),
        tensor.dtype,
        shape=ir.Shape((rows, *shape[1:])),
        name=name,
        base_dir=tensor.base_dir,
    )
    return add_tensor(model, name, part)


def compute_apart(model: ir.Model) -> None:
    """Lets each remaining node compute the numbers that it reads, not those of all matrices of a table."""
    for node in tuple(model.graph):
        for index, value in enumerate(node.inputs):
            found = None if _is_of_table(node) or shape_of(value) is not None else table_rows(value)
            if found is None:
                continue
            builder = NodeBuilder(model, f"{node.name}_numbers_{index}")
            if node.op_type == "Gather" and index == 0:
                rows = found.computed(model, builder, node.inputs[1])
                if builder.nodes:
                    replace_node(model, node, *builder.nodes)
                else:
                    node.replace_input_with(0, rows)
            else:
                whole = found.computed(model, builder)
                model.graph.insert_before(node, builder.nodes)
                node.replace_input_with(index, whole)


def _is_of_table(node: ir.Node) -> bool:
    """Whether a node belongs to a table itself."""
    return (
        node.op_type in ("Cast", "Reshape", "Split")
        or producer(node.inputs[0] if node.inputs else None, "Cast") is not None
    )

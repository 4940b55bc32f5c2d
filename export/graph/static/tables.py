"""Tables of values that depend only on positions, such as cosines and sines, and rows that the host reads for Core ML.

`tabulate_positions` computes a table for every position of the context, and the graph gathers its rows. An NPU computes
in float16, where the angle of position 64 is off by up to 0.03, and that of 1,024 by 0.5. In float32 nothing changes.

`take_tables` is for Core ML, which supports neither row gathers nor angles:

    1. take_rows          the row of a token's id or of a position becomes an input; the table is the weight itself
    2. replace_operators  Reciprocal(x) becomes 1 / x, since Core ML's own adds an epsilon, which changes norms;
                          Neg becomes a product, the Gather of one index a Slice, since Core ML has neither

For each such input, the graph's metadata holds under `names.TABLES` the file of its rows, their offset in bytes, the
table's shape, the input that selects the row, and the input's axis of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from pastkey.contract import names

from ..edit import NodeBuilder, drop_unused_weights, replace_uses, replace_value, weight
from ..part import Subgraph, depends_only_on
from ..write.weights_file import WeightsFile


def take_tables(model: ir.Model, tokens: int, file: WeightsFile) -> None:
    """Runs the passes above on a static graph of T = `tokens`, in which `tabulate_positions` has run."""
    model.metadata_props[names.TABLES] = json.dumps(dict(_take_rows(model, tokens, file)))
    replace_operators(model)
    common.RemoveUnusedNodesPass()(model)
    for value in tuple(model.graph.inputs):
        if value.name in (names.INPUT_IDS, names.POSITION_IDS) and not value.uses():
            model.graph.inputs.remove(value)
    drop_unused_weights(model)


def _input(model: ir.Model, name: str) -> ir.Value | None:
    return next((value for value in model.graph.inputs if value.name == name), None)


# --- positions ----------------------------------------------------------------------------------------------------
def tabulate_positions(model: ir.Model, tokens: int, context_length: int, file: WeightsFile) -> None:
    """Replaces each float32 value that depends only on positions by rows of a table, in a graph of T = `tokens`."""
    source = _input(model, names.POSITION_IDS)
    if source is None:
        return
    inside = depends_only_on(model, [source])
    ends = [
        value
        for node in model.graph
        for value in node.outputs
        if id(value) in inside and any(id(reader.outputs[0]) not in inside for reader, _ in value.uses())
    ]
    for number, value in enumerate(ends):
        if _stored_rows(value, source) is not None:
            continue
        part = Subgraph(model, value, source)
        first = part.run(np.arange(tokens)[None])
        if first.dtype != np.float32:  # integer arithmetic stays
            continue
        axis = _token_axis(part, first, tokens, context_length)
        table = np.empty((context_length, *np.delete(first.shape, axis)), np.float32)
        for start in (*range(0, context_length - tokens, tokens), context_length - tokens):
            rows = part.run(np.arange(start, start + tokens)[None])
            table[start : start + tokens] = np.moveaxis(rows, axis, 0)
        builder = NodeBuilder(model, f"position_table_{number}")
        stored = builder.constant("rows", table.reshape(context_length, -1))  # QNN fails at rows of several axes
        file.take_weight(stored)
        made = builder.add("Gather", stored, source)  # (1, T, ...)
        made = builder.add("Reshape", made, builder.constant("shape", np.array([tokens, *table.shape[1:]])))
        order = [*range(1, axis + 1), 0, *range(axis + 1, table.ndim)]
        made = builder.add("Transpose", made, perm=order)
        end = value.producer()
        assert end is not None
        model.graph.insert_before(end, builder.nodes)
        replace_value(model, value, made)
    common.RemoveUnusedNodesPass()(model)


def _token_axis(part: Subgraph, found: np.ndarray, tokens: int, context_length: int) -> int:
    """Returns the axis along which `found`, of positions 0 to tokens - 1, moves as the positions do."""
    by = min(1, context_length - tokens)
    moved = part.run(np.arange(by, by + tokens)[None])
    axes = [axis for axis, size in enumerate(found.shape) if size == tokens]
    kept = np.arange(tokens - by)
    return next(axis for axis in axes if np.array_equal(found.take(kept + by, axis), moved.take(kept, axis)))


# --- rows that the host reads -------------------------------------------------------------------------------------
def _take_rows(model: ir.Model, tokens: int, file: WeightsFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Replaces rows that ids or positions gather by inputs (1, T, ...). Yields their names and places of storage."""
    for kind, source in (("token", _input(model, names.INPUT_IDS)), ("position", _input(model, names.POSITION_IDS))):
        for number, (node, _) in enumerate(() if source is None else tuple(source.uses())):
            stored = _stored_rows(node.outputs[0], source)
            if source is None or stored is None or stored.const_value is None:
                continue
            tensor = stored.const_value
            rows, *row = tensor.shape.numpy()
            name = f"{kind}_rows_{number}"
            fed = ir.Value(name=name, shape=ir.Shape((1, tokens, *row)), type=ir.TensorType(ir.DataType.FLOAT))
            replace_uses(node.outputs[0], fed)
            model.graph.inputs.append(fed)
            if isinstance(tensor, ir.ExternalTensor):
                place = {"file": tensor.location, "offset": tensor.offset}
            else:
                stored_in, offset = file.place(np.ascontiguousarray(tensor.numpy(), "<f4").tobytes())
                place = {"file": stored_in, "offset": offset}
            yield name, {"of": source.name, "axis": 1, **place, "shape": [rows, 1, *row]}


def _stored_rows(value: ir.Value, source: ir.Value | None) -> ir.Value | None:
    """Returns the weight of which `value` is rows gathered directly by the ids or positions, or None."""
    node = value.producer()
    if node is None or node.op_type != "Gather" or node.inputs[1] is not source:
        return None
    table = node.inputs[0]
    array = weight(table)
    return table if array is not None and array.dtype == np.float32 and not node.attributes.get_int("axis", 0) else None


# --- operators ----------------------------------------------------------------------------------------------------
def replace_operators(model: ir.Model) -> None:
    """Replaces Reciprocal, Neg, and a Gather of one index by other operators."""
    for node in tuple(model.graph):
        builder = NodeBuilder(model, str(node.name))
        if node.op_type == "Reciprocal":
            new = builder.add("Div", builder.constant("one", np.array(1, np.float32)), node.inputs[0])
        elif node.op_type == "Neg":
            new = builder.add("Mul", node.inputs[0], builder.constant("minus_one", np.array(-1, np.float32)))
        elif node.op_type == "Gather" and (index := weight(node.inputs[1])) is not None and not index.ndim:
            first, axis = int(index), node.attributes.get_int("axis", 0)
            bounds = {"start": first, "end": first + 1 or np.iinfo(np.int64).max, "axis": axis}
            part = builder.add(
                "Slice", node.inputs[0], *(builder.constant(k, np.array([n])) for k, n in bounds.items())
            )
            new = builder.add("Squeeze", part, builder.constant("squeezed", np.array([axis])))
        else:
            continue
        model.graph.insert_before(node, builder.nodes)
        replace_value(model, node.outputs[0], new)
        model.graph.remove(node, safe=True)

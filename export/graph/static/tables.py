"""Tables that the host reads in place of the graph, for Core ML, which neither gathers rows nor takes angles.

    1. take_positions     what depends on positions alone, as cosines and sines, becomes an input: a row of a table
                          that is computed here, for every position of the context
    2. take_embeddings    the row of a token's id becomes an input; the table is the weight itself
    3. replace_operators  Reciprocal(x) becomes 1 / x, since Core ML's own adds an epsilon, which a norm notices;
                          Neg and the Gather of one index, which it does not take at all, a product and a Slice

The graph's metadata says under `names.TABLES` for each such input which file its rows stand in, at which offset in
bytes, the table's shape, what chooses the row, and which axis of the input the tokens are.
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
from ..part import Part, depends_only_on
from ..write.weights_file import WeightsFile


def take_tables(model: ir.Model, tokens: int, context_length: int, file: WeightsFile) -> None:
    """Runs the passes above on a static graph of T = `tokens`."""
    places: dict[str, dict[str, Any]] = {}
    for place in (*_take_positions(model, tokens, context_length, file), *_take_embeddings(model, tokens, file)):
        places[place.pop("input")] = place
    replace_operators(model)
    common.RemoveUnusedNodesPass()(model)
    for value in tuple(model.graph.inputs):
        if value.name in (names.INPUT_IDS, names.POSITION_IDS) and not value.uses():
            model.graph.inputs.remove(value)
    drop_unused_weights(model)
    model.metadata_props[names.TABLES] = json.dumps(places)


def _input(model: ir.Model, name: str) -> ir.Value | None:
    return next((value for value in model.graph.inputs if value.name == name), None)


def _feed(model: ir.Model, value: ir.Value, name: str, shape: tuple[int, ...]) -> None:
    """Makes an input of a value."""
    new = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    replace_uses(value, new)
    model.graph.inputs.append(new)


def _placed(file: WeightsFile, table: np.ndarray) -> dict[str, Any]:
    name, offset = file.place(np.ascontiguousarray(table, "<f4").tobytes())
    return {"file": name, "offset": offset, "shape": list(table.shape)}


# --- positions ----------------------------------------------------------------------------------------------------
def _take_positions(model: ir.Model, tokens: int, context_length: int, file: WeightsFile) -> Iterator[dict[str, Any]]:
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
        stored = _stored_rows(value, source)
        if stored is not None:
            yield _fed_by(model, value, f"position_rows_{number}", stored, tokens, file)
            continue
        part = Part(model, value, source)
        first = part.run(np.arange(tokens)[None])
        if first.dtype != np.float32:  # arithmetic with whole numbers stays
            continue
        axis = _token_axis(part, first, tokens)
        starts = range(0, context_length, tokens)
        parts = [part.run(np.minimum(np.arange(i, i + tokens), context_length - 1)[None]) for i in starts]
        table = np.concatenate([np.moveaxis(rows, axis, 0) for rows in parts])[:context_length]
        name = f"position_rows_{number}"
        _feed(model, value, name, first.shape)
        yield {"input": name, "of": names.POSITION_IDS, "axis": axis, **_placed(file, table)}


def _token_axis(part: Part, found: np.ndarray, tokens: int) -> int:
    """The axis that turns round where the positions do; of one token any axis of size 1."""
    turned = part.run(np.arange(tokens)[::-1][None])
    axes = [axis for axis, size in enumerate(found.shape) if size == tokens]
    return next(axis for axis in axes if np.array_equal(np.flip(found, axis), turned))


# --- embeddings ---------------------------------------------------------------------------------------------------
def _take_embeddings(model: ir.Model, tokens: int, file: WeightsFile) -> Iterator[dict[str, Any]]:
    source = _input(model, names.INPUT_IDS)
    for number, (node, index) in enumerate(() if source is None else tuple(source.uses())):
        if node.op_type == "Gather" and index == 1 and (stored := _stored_rows(node.outputs[0], node.inputs[1])):
            yield _fed_by(model, node.outputs[0], f"token_rows_{number}", stored, tokens, file)


def _stored_rows(value: ir.Value, source: ir.Value | None) -> ir.Value | None:
    """The weight whose rows `value` is, gathered by the ids or positions themselves."""
    node = value.producer()
    if node is None or node.op_type != "Gather" or node.inputs[1] is not source:
        return None
    table = node.inputs[0]
    array = weight(table)
    return table if array is not None and array.dtype == np.float32 and not node.attributes.get_int("axis", 0) else None


def _fed_by(
    model: ir.Model, value: ir.Value, name: str, stored: ir.Value, tokens: int, file: WeightsFile
) -> dict[str, Any]:
    """Makes `value`, the rows of a weight, an input (1, T, ...)."""
    node, tensor = value.producer(), stored.const_value
    assert node is not None
    assert tensor is not None
    source = node.inputs[1]
    assert source is not None
    shape = tuple(tensor.shape.numpy())
    _feed(model, value, name, (1, tokens, *shape[1:]))
    if isinstance(tensor, ir.ExternalTensor):
        place = {"file": tensor.location, "offset": tensor.offset}
    else:
        place = _placed(file, tensor.numpy())
    return {"input": name, "of": source.name, "axis": 1, **place, "shape": [shape[0], 1, *shape[1:]]}


# --- operators ----------------------------------------------------------------------------------------------------
def replace_operators(model: ir.Model) -> None:
    """Writes Reciprocal, Neg, and a Gather of one index in other operators."""
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

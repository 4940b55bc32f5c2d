"""Moves the embedding lookup of pastkey's own graph to the runtime, which feeds the rows of the tokens.

onnxruntime maps the weights file, and the system loads neighbours of each gathered row, until most of the table is in
memory. Reading a row from the file loads only that row.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import onnx_ir as ir

from pastkey.contract import names

from ..edit import NodeBuilder, drop_unused_weights, replace_uses

_LARGE = 1 << 20  # bytes: smaller tables stay in the graph
_TABLE = "embedding_rows.table"


def take_embedding_rows(model: ir.Model) -> None:
    """Replaces the quantized rows gathered by `input_ids` with an input, if the table is large."""
    readers = [use for value in model.graph.inputs if value.name == names.INPUT_IDS for use in value.uses()]
    for node, index in readers:
        table = node.inputs[0]
        if node.op_type != "Gather" or index != 1 or table is None or not _is_large_table(table):
            continue
        stored = table.const_value
        assert isinstance(stored, ir.ExternalTensor)
        rows = ir.Value(
            name=names.EMBEDDING_ROWS,
            shape=ir.Shape([names.BATCH, names.SEQUENCE, *stored.shape[1:]]),
            type=ir.TensorType(ir.DataType.UINT8),
        )
        replace_uses(node.outputs[0], rows)
        model.graph.remove(node, safe=True)
        model.graph.inputs.append(rows)
        place = {"file": stored.location, "offset": stored.offset, "shape": list(stored.shape.numpy())}
        model.metadata_props[names.EMBEDDING_ROWS] = json.dumps(place)
        drop_unused_weights(model)
        return


def give_embedding_back(model: ir.Model, folder: Path) -> None:
    """Undoes `take_embedding_rows` for programs that cannot feed rows. `folder` holds the weights file."""
    rows = next((value for value in model.graph.inputs if value.name == names.EMBEDDING_ROWS), None)
    if rows is None:
        return
    place = json.loads(model.metadata_props.pop(names.EMBEDDING_ROWS))
    length = math.prod(place["shape"])  # one byte each
    stored = ir.ExternalTensor(
        place["file"],
        place["offset"],
        length,
        ir.DataType.UINT8,
        shape=ir.Shape(place["shape"]),
        name=_TABLE,
        base_dir=folder,
    )
    table = ir.Value(name=_TABLE, shape=stored.shape, type=ir.TensorType(stored.dtype), const_value=stored)
    model.graph.register_initializer(table)
    builder = NodeBuilder(model, "embedding_rows")
    ids = next(value for value in model.graph.inputs if value.name == names.INPUT_IDS)
    replace_uses(rows, builder.add("Gather", table, ids))
    model.graph.insert_before(model.graph[0], builder.nodes)
    model.graph.inputs.remove(rows)


def _is_large_table(value: ir.Value) -> bool:
    stored = value.const_value
    return isinstance(stored, ir.ExternalTensor) and stored.dtype == ir.DataType.UINT8 and stored.nbytes >= _LARGE

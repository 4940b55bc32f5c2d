"""Writing the graphs of a bundle over one weights file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir

from pastkey import names
from pastkey.precisions import PRECISIONS

from .embedding_rows import take_embedding_rows
from .hidden_states import yield_hidden_states
from .last_logits import keep_last_positions
from .output_head import take_head
from .sequence_lengths import take_sequence_lengths

# Below this, a weight stands in the graph itself: shapes and axes must, for onnxruntime to infer shapes from them.
INLINE_BYTES = 1024
_ALIGNMENT = 64  # bytes; a cache line
_PAGE_ALIGNMENT, _PAGE_ALIGNED_FROM = 4096, 1 << 20  # large weights start on a page, to be mapped


def write_graphs(model: ir.Model, folder: Path, precision: str, hidden_size: int | None = None) -> int:
    """Writes the all-logits graph, its weights, and the last-logits graph over the same weights. Changes `model`.

    With `hidden_size`, which needs an output head, the second gives the last hidden states, too.

    Returns the bytes of the weights, in their own file and in the graph.
    """
    head = take_head(model)  # first: its marks are no part of a file
    all_logits = folder / PRECISIONS[precision].graph
    all_logits.parent.mkdir(parents=True, exist_ok=True)
    weight_bytes = _move_weights_out(model, all_logits.with_name(all_logits.name + names.DATA_SUFFIX))
    ir.save(model, all_logits)
    if hidden_size is not None:
        yield_hidden_states(model, head, hidden_size, half=PRECISIONS[precision].bits == 16)
    keep_last_positions(model, head)
    take_sequence_lengths(model)
    take_embedding_rows(model)
    ir.save(model, folder / names.LAST_LOGITS_GRAPH)
    return weight_bytes


def count_operators(model: ir.Model) -> dict[str, int]:
    """Operator -> number of nodes, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph).most_common())


_WEIGHTS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.UINT4)


def _move_weights_out(model: ir.Model, path: Path) -> int:
    """Writes the larger initializers to one file and points the graph at it.

    Initializers over the same memory are written once and share the bytes: a tied head and its embedding. A model
    so small that all its weights stand in the graph gets no file. Returns the bytes of all floating-point and
    quantized weights.
    """
    inline = 0
    # (address, bytes) -> offset, and the array itself: while it lives, no other array has its address
    written: dict[tuple[int, int], tuple[int, np.ndarray]] = {}
    with path.open("wb") as file:
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            tensor = value.const_value
            array, size = np.ascontiguousarray(tensor.numpy()), int(tensor.nbytes)
            if size < INLINE_BYTES:
                inline += size if tensor.dtype in _WEIGHTS else 0
                continue
            memory = (array.ctypes.data, size)
            if memory not in written:
                alignment = _PAGE_ALIGNMENT if size >= _PAGE_ALIGNED_FROM else _ALIGNMENT
                file.write(b"\0" * (-file.tell() % alignment))
                written[memory] = (file.tell(), array)
                packed = tensor.dtype in (ir.DataType.UINT4, ir.DataType.INT4)  # two in a byte
                file.write(tensor.tobytes() if packed else array.astype(array.dtype.newbyteorder("<"), copy=False).data)
            value.const_value = ir.ExternalTensor(
                path.name,
                written[memory][0],
                size,
                tensor.dtype,
                shape=ir.Shape(array.shape),
                name=str(value.name),
                base_dir=path.parent,
            )
        external = file.tell()
    if not external:
        path.unlink()
    return external + inline

"""Lets the runtime evict cached rows behind sliding windows from pastkey's own fused graph.

GroupQueryAttention assumes the newest tokens in its buffer. So a call with a window gets the number of rows
that are left in its own buffer instead of the number of tokens, and turns keys by position_ids.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pastkey.contract import names

from ..edit import NodeBuilder
from .sequence_lengths import SEQLENS_K, TOTAL

POSITION_IDS = 9  # an input of GroupQueryAttention


def evict_behind_windows(model: ir.Model, context_length: int) -> None:
    """Gives a graph whose attention calls read lengths the input `evicted`, if some see less than the context."""
    calls = [
        node
        for node in model.graph
        if node.op_type == "GroupQueryAttention"
        and 0 < node.attributes.get_int("local_window_size", 0) < context_length
    ]
    if not calls:
        return
    inputs = {str(value.name): value for value in model.graph.inputs}
    evicted = ir.Value(name=names.EVICTED, shape=ir.Shape([names.BATCH]), type=ir.TensorType(ir.DataType.INT32))
    model.graph.inputs.append(evicted)
    builder = NodeBuilder(model, names.EVICTED)
    last = builder.add("Sub", inputs[names.SEQLENS_K], evicted)
    one = builder.constant("one", np.array(1, np.int32))
    longest = builder.add("Add", builder.add("ReduceMax", last, keepdims=0), one)
    new = builder.add("Squeeze", builder.add("Shape", inputs[names.INPUT_IDS], start=1, end=2))
    # A first run is one whose total is the number of new tokens, some of which may be padding.
    total = builder.add("Max", longest, builder.add("Cast", new, to=ir.DataType.INT32))
    model.graph.insert_before(calls[0], builder.nodes)
    for call in calls:
        call.replace_input_with(SEQLENS_K, last)
        call.replace_input_with(TOTAL, total)
        if call.attributes.get_int("do_rotary", 0):
            call.resize_inputs(max(len(call.inputs), POSITION_IDS + 1))
            call.replace_input_with(POSITION_IDS, inputs[names.POSITION_IDS])
        for value in (*call.inputs[3:5], *call.outputs[1:]):
            assert value is not None
            assert value.shape is not None
            value.shape = ir.Shape([names.IN_WINDOW if dim == 2 else size for dim, size in enumerate(value.shape)])

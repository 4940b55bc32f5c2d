"""The last-logits graph: returns the logits of as many last positions as the runtime asks for.

Generation needs one position, or a few when several tokens are verified at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from pastkey.contract import names

from ..edit import NodeBuilder


def keep_last_positions(model: ir.Model, head: Sequence[ir.Node]) -> None:
    """Reduces `logits` to the last of the new tokens, (B, N, V). A new input, `logits_start`, is -N.

    Slice reads it directly, so nothing is computed from it on the CPU.

    Args:
        model: An all-logits graph, changed in place.
        head: The nodes of the output head in the graph's order (`output_head.take_head`). Positions are selected before
            them, so that the head's MatMul has N rows instead of T. Without a head, they are selected from the logits.
    """
    place, logits = next((i, value) for i, value in enumerate(model.graph.outputs) if value.name == names.LOGITS)
    start = ir.Value(name=names.LOGITS_START, shape=ir.Shape((1,)), type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.append(start)
    builder = NodeBuilder(model, "last_positions")
    end, axis = (builder.constant(n, np.array([i])) for n, i in (("end", np.iinfo(np.int64).max), ("axis", 1)))
    assert logits.shape is not None
    shape = ir.Shape((names.BATCH, names.KEPT, logits.shape[-1]))
    if head:
        hidden = head[0].inputs[0]
        assert hidden is not None
        chosen = builder.add("Slice", hidden, start, end, axis)
        model.graph.insert_before(head[0], builder.nodes)
        for node, index in tuple(hidden.uses()):
            if node in head:
                node.replace_input_with(index, chosen)
        logits.shape = shape
    else:
        producer = logits.producer()
        assert producer is not None
        logits.name = f"{names.LOGITS}_of_every_position"
        chosen = builder.add("Slice", logits, start, end, axis)
        model.graph.insert_after(producer, builder.nodes)
        chosen.name, chosen.type, chosen.shape = names.LOGITS, logits.type, shape
        model.graph.outputs[place] = chosen

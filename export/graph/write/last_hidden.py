"""Adds the last hidden states, the input of the output head, as an output of the last-logits graph.

A separate graph would need a separate session, and so a second copy of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from pastkey.contract import names

from ..edit import NodeBuilder


def yield_hidden_states(model: ir.Model, head: Sequence[ir.Node], hidden_size: int, *, half: bool = False) -> None:
    """Adds the output `last_hidden_state` (B, T, H) float32, of every position.

    Args:
        model: An all-logits graph, changed in place; `keep_last_positions` comes after this.
        head: The nodes of the output head in the graph's order (`output_head.take_head`), at least one.
        hidden_size: H.
        half: Whether the graph computes it in float16.
    """
    hidden = head[0].inputs[0]
    assert hidden is not None
    if half:
        builder = NodeBuilder(model, names.LAST_HIDDEN_STATE)
        hidden = builder.add("Cast", hidden, to=ir.DataType.FLOAT)
        model.graph.insert_before(head[0], builder.nodes)
    hidden.name, hidden.type = names.LAST_HIDDEN_STATE, ir.TensorType(ir.DataType.FLOAT)
    hidden.shape = ir.Shape((names.BATCH, names.SEQUENCE, hidden_size))
    model.graph.outputs.append(hidden)

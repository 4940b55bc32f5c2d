"""Feeds sequence lengths instead of a mask to pastkey's own fused graph: the runtime knows them.

Counting the mask needs operators that a GPU's provider leaves to the CPU, so both wait for each other at every token.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from pastkey.contract import names

from ..edit import replace_uses

SEQLENS_K, TOTAL = 5, 6  # inputs of GroupQueryAttention


def take_sequence_lengths(model: ir.Model) -> None:
    """Replaces the mask by the inputs of GroupQueryAttention, `seqlens_k` and `total_sequence_length`."""
    calls = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    if not calls:
        return
    for place, name, shape in (
        (SEQLENS_K, names.SEQLENS_K, [names.BATCH]),
        (TOTAL, names.TOTAL_SEQUENCE_LENGTH, list[str]()),
    ):
        length = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT32))
        for counted in {id(call.inputs[place]): call.inputs[place] for call in calls}.values():
            assert counted is not None
            replace_uses(counted, length)
        model.graph.inputs.append(length)
    common.RemoveUnusedNodesPass()(model)
    mask = next(value for value in model.graph.inputs if value.name == names.ATTENTION_MASK)
    if not mask.uses():
        model.graph.inputs.remove(mask)

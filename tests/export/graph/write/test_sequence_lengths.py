"""pastkey's own fused graph is told its lengths, and computes what the counted mask gave."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pastkey.contract import names
from pastkey.export.graph.write.sequence_lengths import take_sequence_lengths

from ...small_graphs import model_of, run_model

FUSED = """
g (float[batch_size,sequence_length,16] x, int64[batch_size,total_sequence_length] attention_mask,
   float[batch_size,2,past,8] past_key, float[batch_size,2,past,8] past_value)
   => (float[batch_size,sequence_length,16] y, float[batch_size,2,s,8] present_key,
       float[batch_size,2,s,8] present_value) {
    one = Constant <value_ints = [1]> ()
    real = ReduceSum <keepdims = 0> (attention_mask, one)
    last = Sub(real, one)
    seqlens = Cast <to = 6> (last)
    shape = Shape <start = 1> (attention_mask)
    scalar = Squeeze(shape)
    total = Cast <to = 6> (scalar)
    y, present_key, present_value = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 2>
        (x, x, x, past_key, past_value, seqlens, total)
}
"""


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_lengths_stand_in_the_place_of_the_mask():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 16)).astype(np.float32)
    past = {name: rng.normal(size=(2, 2, 8, 8)).astype(np.float32) for name in ("past_key", "past_value")}
    mask = np.ones((2, 3), np.int64)
    mask[1, 2] = 0  # a row that is shorter
    model = model_of(FUSED)
    expected = run_model(model, x=x, attention_mask=mask, **past)
    take_sequence_lengths(model)
    assert operators(model) == ["GroupQueryAttention"]
    assert names.ATTENTION_MASK not in {value.name for value in model.graph.inputs}
    found = run_model(
        model, x=x, seqlens_k=np.array([2, 1], np.int32), total_sequence_length=np.array(3, np.int32), **past
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_graph_without_the_operator_keeps_its_mask():
    model = model_of("g (int64[b,s] attention_mask) => (int64[b,s] y) { y = Neg(attention_mask) }")
    take_sequence_lengths(model)
    assert [value.name for value in model.graph.inputs] == [names.ATTENTION_MASK]


def test_every_attention_call_of_an_export_reads_the_same_lengths(exported):
    for name in ("llama", "gpt2"):
        graph = exported(name, "fp32").graph(last=True).graph
        calls = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
        assert calls
        assert all(list(node.input[5:7]) == ["seqlens_k", "total_sequence_length"] for node in calls)
        assert {"ReduceSum", "Shape", "Neg"}.isdisjoint(node.op_type for node in graph.node)

"""The logits of the last positions, chosen before the output head where there is one."""

import numpy as np
import pytest

from pastkey.contract import names
from pastkey.export.graph.write.last_logits import keep_last_positions
from pastkey.export.graph.write.output_head import output_head, take_head
from pastkey.export.graph.write.sequence_lengths import take_sequence_lengths
from pastkey.export.quantize.adapters import take_adaptable
from pastkey.export.quantize.rounding.rewrite import quantize

from ...small_graphs import head_of, model_of, run_model

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize(
    ("body", "source"),
    [
        ("h = Neg(x) p = MatMul(h, w) logits = Tanh(p)", "h"),
        ("h = Neg(x) p = MatMul(h, w) logits = Softmax <axis = 1> (p)", "logits_of_every_position"),
    ],
    ids=["softcap", "no_head"],
)
def test_the_last_logits_are_those_of_the_whole(body, source, int8):
    model = head_of(body)
    if int8:
        quantize(model)
    x = RNG.normal(size=(2, 5, 32)).astype(np.float32)
    (whole,) = run_model(model, x=x)
    keep_last_positions(model, take_head(model))
    (chosen,) = (node for node in model.graph if str(node.name).startswith("last_positions_Slice"))
    assert chosen.inputs[0].name == source
    readers = [
        node.op_type for node, _ in next(node for node in model.graph if node.op_type == "Neg").outputs[0].uses()
    ]
    assert readers == ["Slice"] or source != "h"  # all that an int8 head is made of, too
    for count in (1, 3, 5):
        (last,) = run_model(model, x=x, logits_start=np.array([-count]))
        np.testing.assert_allclose(last, whole[:, -count:], rtol=1e-5, atol=1e-6)
    (logits,) = model.graph.outputs
    assert logits.name == names.LOGITS
    assert [str(d) for d in logits.shape] == [names.BATCH, names.KEPT, "40"]


# --- the output head is found in the float32 graph, and marked where int8 nodes take its place ------------------------
@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("t = Transpose <perm = [1, 0]> (e) logits = MatMul(x, t)", True),
        ("p = MatMul(x, w) s = Add(p, b) t = Tanh(s) logits = Mul(t, b)", True),
        ("p = MatMul(x, w) logits = Softmax(p)", False),
        ("p = MatMul(x, w) q = MatMul(x, w) logits = Add(p, q)", False),
        ("t = Transpose <perm = [0, 2, 1]> (x) logits = MatMul(x, t)", False),
    ],
    ids=["tied", "bias_and_softcap", "positions_mixed", "two_products", "no_weight"],
)
def test_a_head_is_a_product_with_position_wise_operators_behind_it(body, found):
    model = head_of(body)
    head = output_head(model)
    assert (head is not None) == found
    if head is not None:
        assert (head.op_type, head.inputs[0].name) == ("MatMul", "x")
    assert take_head(model) == [node for node in (head,) if node is not None]
    model.graph.outputs[0].name = "no_logits"
    assert output_head(model) is None


@pytest.mark.parametrize("columns", [32, 40], ids=["whole_blocks", "padded"])
def test_an_int8_head_is_marked_with_all_that_reads_its_input(columns):
    model = head_of("p = MatMul(x, w) s = Add(p, b) logits = Tanh(s)", columns)
    quantize(model)
    head = take_head(model)
    assert len(head) > 8
    assert sum(node.op_type == "MatMulNBits" for node in head) == 1
    (x,) = model.graph.inputs
    readers = {node.op_type for node, _ in x.uses()}
    assert readers == {"Sub", "Pad" if columns % 32 else "Reshape"}
    assert all(node in head for node, _ in x.uses())
    assert head[0].inputs[0] is x
    take_adaptable(model)
    assert not any(node.metadata_props for node in model.graph)  # taken once


def test_a_head_that_stays_in_float32_is_found():
    model = head_of("logits = MatMul(x, w)")
    quantize(model, keep=["w"])
    assert [node.op_type for node in take_head(model)] == ["MatMul"]


# --- pastkey's own fused graph is told its lengths, and computes what the counted mask gave ---------------------------
FUSED = """g (float[batch_size,sequence_length,16] x, int64[batch_size,total_sequence_length] attention_mask,
float[batch_size,2,past,8] past_key, float[batch_size,2,past,8] past_value) =>
(float[batch_size,sequence_length,16] y, float[batch_size,2,s,8] present_key, float[batch_size,2,s,8] present_value) {
one = Constant <value_ints = [1]> () real = ReduceSum <keepdims = 0> (attention_mask, one) last = Sub(real, one)
seqlens = Cast <to = 6> (last) shape = Shape <start = 1> (attention_mask) scalar = Squeeze(shape)
total = Cast <to = 6> (scalar)
y, present_key, present_value = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 2>
(x, x, x, past_key, past_value, seqlens, total) }"""


def test_lengths_stand_in_the_place_of_the_mask():
    x = RNG.normal(size=(2, 3, 16)).astype(np.float32)
    past = {name: RNG.normal(size=(2, 2, 8, 8)).astype(np.float32) for name in ("past_key", "past_value")}
    mask = np.array([[1, 1, 1], [1, 1, 0]])  # a row that is shorter
    model = model_of(FUSED)
    expected = run_model(model, x=x, attention_mask=mask, **past)
    take_sequence_lengths(model)
    assert [node.op_type for node in model.graph] == ["GroupQueryAttention"]
    assert names.ATTENTION_MASK not in {value.name for value in model.graph.inputs}
    lengths = {"seqlens_k": np.array([2, 1], np.int32), "total_sequence_length": np.array(3, np.int32)}
    for found, wanted in zip(run_model(model, x=x, **lengths, **past), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_graph_without_the_operator_keeps_its_mask():
    model = model_of("g (int64[b,s] attention_mask) => (int64[b,s] y) { y = Neg(attention_mask) }")
    take_sequence_lengths(model)
    assert [value.name for value in model.graph.inputs] == [names.ATTENTION_MASK]

"""The logits of the last positions, chosen before the output head where there is one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.contract import names
from pastkey.export.graph.write.last_logits import keep_last_positions
from pastkey.export.graph.write.output_head import take_head
from pastkey.export.quantize.rounding.rewrite import quantize

from ...small_graphs import model_of, run_model

RNG = np.random.default_rng(0)
W = RNG.normal(size=(40, 9)).astype(np.float32)
TEXT = (
    "g (float[batch_size,sequence_length,40] x, float[40,9] w) => (float[batch_size,sequence_length,9] logits) {{ {} }}"
)


def chosen_from(model: ir.Model) -> str:
    """The name of what the last positions are taken of."""
    (node,) = (node for node in model.graph if str(node.name).startswith("last_positions_Slice"))
    return str(node.inputs[0].name)


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize(
    ("body", "source"),
    [
        ("h = Neg(x) logits = MatMul(h, w)", "h"),
        ("h = Neg(x) p = MatMul(h, w) logits = Tanh(p)", "h"),
        ("h = Neg(x) p = MatMul(h, w) logits = Softmax <axis = 1> (p)", "logits_of_every_position"),
    ],
    ids=["head", "softcap", "no_head"],
)
def test_the_last_logits_are_those_of_the_whole(body, source, int8):
    model = model_of(TEXT.format(body), w=W)
    if int8:
        quantize(model)
    x = RNG.normal(size=(2, 5, 40)).astype(np.float32)
    (whole,) = run_model(model, x=x)
    keep_last_positions(model, take_head(model))
    assert chosen_from(model) == source
    for count in (1, 3, 5):
        (last,) = run_model(model, x=x, logits_start=np.array([-count]))
        np.testing.assert_allclose(last, whole[:, -count:], rtol=1e-5, atol=1e-6)
    (logits,) = model.graph.outputs
    assert logits.name == names.LOGITS
    assert [str(d) for d in logits.shape] == [names.BATCH, names.KEPT, "9"]


def test_everything_of_an_int8_head_reads_the_chosen_positions():
    model = model_of(TEXT.format("h = Neg(x) logits = MatMul(h, w)"), w=W)
    quantize(model)
    keep_last_positions(model, take_head(model))
    (hidden,) = (node.outputs[0] for node in model.graph if node.op_type == "Neg" and node.inputs[0].name == "x")
    assert [node.op_type for node, _ in hidden.uses()] == ["Slice"]

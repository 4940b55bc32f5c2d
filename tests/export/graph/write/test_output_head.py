"""The output head: the logits of the last positions are chosen before it, and last hidden states are its input."""

import shutil

import numpy as np
import pytest
import torch

from pastkey.contract import names
from pastkey.errors import ContractError, IntegrityError
from pastkey.export import export
from pastkey.export.graph.write.last_hidden import yield_hidden_states
from pastkey.export.graph.write.last_logits import keep_last_positions
from pastkey.export.graph.write.output_head import hidden_size, output_head, take_head
from pastkey.export.measure.hidden_states import head_input
from pastkey.export.measure.metrics import cosine_distance
from pastkey.export.quantize.adapters import take_adaptable
from pastkey.export.quantize.rounding.rewrite import quantize
from pastkey.files.durable import write_json
from pastkey.providers import Form
from pastkey.runtime import load

from ....shared import divided
from ...decoders import llama
from ...graft.plain import plain
from ...small_graphs import head_of, run_model

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


# --- the output head is found in the float32 graph, and marked where int8 nodes replace it ---------------------------
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
    assert not any(node.metadata_props for node in model.graph)  # used once


def test_a_head_that_stays_in_float32_is_found():
    model = head_of("logits = MatMul(x, w)")
    quantize(model, keep=["w"])
    assert [node.op_type for node in take_head(model)] == ["MatMul"]


# --- last hidden states ----------------------------------------------------------------------------------------------
FAMILIES = ("gemma2", "cohere2", "granite", "llama", "gpt2", "opt", "bloom", "lfm2")  # some scale or cap their logits


@pytest.mark.parametrize("form", [None, *Form])
@pytest.mark.parametrize(
    "body",
    [
        "h = Neg(x) logits = MatMul(h, w)",
        "h = Neg(x) p = MatMul(h, w) s = Add(p, b) logits = Tanh(s)",
        "t = Transpose <perm = [1, 0]> (e) h = Neg(x) logits = MatMul(h, t)",
    ],
    ids=["plain", "bias_and_softcap", "tied"],
)
def test_they_are_the_heads_input_whatever_the_head_is_made_of(body, form):
    model = head_of(body)
    head = output_head(model)
    assert head is not None
    assert hidden_size(head) == 32
    if form is not None:
        quantize(model, form=form)
    nodes = take_head(model)
    yield_hidden_states(model, nodes, 32)
    keep_last_positions(model, nodes)
    x = RNG.normal(size=(2, 5, 32)).astype(np.float32)
    logits, states = run_model(model, x=x, logits_start=np.array([-1]))
    np.testing.assert_array_equal(states, -x)
    assert logits.shape == (2, 1, 40)
    assert [str(size) for size in model.graph.outputs[1].shape or ()] == [names.BATCH, names.SEQUENCE, "32"]


MADE = [(family, "fp32", graph) for family in FAMILIES for graph in ("auto", "standard")]
MADE += [(family, precision, "auto") for family in FAMILIES for precision in ("int8", "int4", "fp16")]
LIMITS = {"fp32": 1e-9, "fp16": 1e-4, "int8": 0.01, "int4": 0.2}


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize(
    ("family", "precision", "graph"), divided(MADE, ci=[("gemma2", "fp32", "auto"), ("granite", "fp16", "auto")])
)
def test_they_are_those_of_transformers(family, precision, graph, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from ...families import build

    model = build(family)
    if family == "granite":
        model.config.logits_scaling = 4.0
    out = tmp_path / "bundle"
    report = export(model, out, precision=precision, graph=graph, context_length=96, hidden_states=True)
    assert report.manifest.hidden_size == 64
    assert "hidden_states" in report.manifest.parity[precision]["checks"]
    ids = np.random.default_rng(3).integers(0, 97, 40).tolist()
    lm = load(out, threads=1)
    for text in (ids, ids[:3]):
        with torch.no_grad():
            expected = model(torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0].numpy()
        found = lm.embed(text, pooling="none", normalize=False)
        if precision == "fp32":
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        assert cosine_distance(expected, found) < LIMITS[precision]


@pytest.mark.slow
def test_smoothing_leaves_their_channels_as_they_are(tmp_path):
    """Scales that move from the last norm into the head would be another vector, with the same logits."""
    module = llama(tie_word_embeddings=False)
    with torch.no_grad():  # channels of very different sizes, which are worth being moved
        module.model.norm.weight.copy_(torch.logspace(-1.5, 1.5, 48))
    out, ids = tmp_path / "bundle", np.arange(20) * 3 % 61
    export(module, out, context_length=40, hidden_states=True)
    found = load(out, threads=1).embed(ids.tolist(), pooling="none", normalize=False)
    assert cosine_distance(head_input(module, ids), found) < 1e-2


def test_the_manifest_speaks_of_them_only_where_the_graph_gives_them(exported, tmp_path):
    bundle = exported("three_axes").bundle
    assert (bundle.manifest.hidden_size, "hidden_states" in bundle.manifest.parity["fp32"]["checks"]) == (None, False)
    shutil.copytree(bundle.path, tmp_path / "plain")
    write_json(tmp_path / "plain" / names.MANIFEST, bundle.manifest.to_json() | {"hidden_size": 6})
    with pytest.raises(IntegrityError, match="no tensor 'last_hidden_state', which the manifest names"):
        load(tmp_path / "plain", verify=False)


@pytest.mark.slow
def test_a_decoder_without_one_head_is_refused(tmp_path):
    module = plain({"logits": lambda m, hidden: m.head(hidden) + m.head(hidden).softmax(-1)})
    with pytest.raises(ContractError, match="Decoder cannot give its last hidden states"):
        export(module, tmp_path / "bundle", precision="fp32", context_length=8, hidden_states=True)
    assert not (tmp_path / "bundle").exists()

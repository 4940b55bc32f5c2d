"""Smoothing changes no MatMul's result, and makes int8 better where channels differ."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from pastkey.contract.bundle import Bundle
from pastkey.export import export
from pastkey.export.compare import relative_difference
from pastkey.export.measure.metrics import kl_divergence
from pastkey.export.measure.texts import self_generated_texts
from pastkey.export.progress import SILENT, Recorder
from pastkey.export.quantize.calibrate import calibration
from pastkey.export.quantize.calibrate.activations import probing
from pastkey.export.quantize.calibrate.smoothing import smooth
from pastkey.export.quantize.calibrate.smoothing_groups import ChannelWeight, find_groups
from pastkey.export.quantize.rounding.rewrite import quantize
from pastkey.runtime import Engine

from ...decoders import llama
from ...small_graphs import model_of, run_model

IDS = np.random.default_rng(0).integers(0, 61, 40)


def activations(graph, ids=IDS):
    """A graph, its groups, and their activations."""
    model = ir.load(graph)
    groups = find_groups(model)
    with probing(model, graph.parent, [group.activation for group in groups]) as probe:
        return model, groups, probe(np.array(ids))


def smoothed(graph, ids=IDS):
    """The smoothed graph, and the exponents."""
    model, groups, samples = activations(graph, ids)
    return model, smooth(model, groups, samples)


def exported_graph(module, folder):
    return export(module, folder / "fp32", precision="fp32", context_length=40).path / "onnx" / "model.onnx"


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("llama", 8),  # per layer: q k v, o (two query heads to a value head), gate and up, down; the head is tied
        ("gpt2", 9),  # per layer: q k v, o, the MLP's two (GELU lets channels be permuted, no more); the head
        ("nano_gpt", 3),  # q, k, v are one MatMul, so that the values have no separate one; the head is tied
    ],
)
def test_smoothing_changes_no_logits(name, groups, exported, computed):
    bundle = exported(name).bundle
    (ids,) = self_generated_texts(Engine(bundle), 0, 1, bundle.manifest.context_length)
    found = find_groups(ir.load(bundle.all_logits_graph))
    assert len(found) == groups, [group.activation for group in found]
    model, chosen = smoothed(bundle.all_logits_graph, ids)
    assert set(chosen) == {group.activation for group in found}
    assert relative_difference(computed(ir.load(bundle.all_logits_graph), ids), computed(model, ids)) < 5e-6


def test_weights_that_have_several_places_are_in_no_group(exported):
    assert find_groups(ir.load(exported("one_block_twice").bundle.all_logits_graph)) == []


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_channels_between_two_products_are_put_in_the_order_of_their_size(name, exported):
    """One activation of each of two layers' MLPs; GPT-2's first projection has a bias, which moves along."""
    graph = exported(name).bundle.all_logits_graph
    _, groups, before = activations(graph)
    wanted = [group.activation for group in groups if group.permuted]
    assert len(wanted) == 2
    model, _ = smoothed(graph)
    with probing(model, graph.parent, wanted) as probe:
        after = probe(IDS)
    for name in wanted:
        sizes = np.abs(after[name] / np.sqrt(np.square(before[name]).mean(1, keepdims=True))).max(0)
        assert (np.diff(sizes) > -1e-4 * sizes.max()).all()
        assert not (np.diff(np.abs(before[name]).max(0)) >= 0).all()


@pytest.mark.parametrize("number", [0.0, 1e-45, 3e38])
@pytest.mark.parametrize("projection", ["q_proj", "down_proj", "v_proj"])
def test_weights_without_any_size_to_go_by_are_left_as_they_are(projection, number, exported, recwarn):
    """A layer that was switched off, numbers that cannot be divided by, and one that overflows when it is scaled."""
    model, groups, samples = activations(exported("llama").bundle.all_logits_graph)
    for name, value in model.graph.initializers.items():
        if f"layers.0.self_attn.{projection}" in str(name) or f"layers.0.mlp.{projection}" in str(name):
            array = value.const_value.numpy().copy()
            array[:] = number if number < 1 else array
            array[0, 0] = number
            value.const_value = ir.Tensor(array, name=value.name)
    smooth(model, groups, samples)
    for name, value in model.graph.initializers.items():
        assert np.isfinite(value.const_value.numpy()).all(), name
    assert not list(recwarn)


def test_activations_that_are_nothing_are_left_as_they_are(exported, recwarn):
    model, groups, samples = activations(exported("llama").bundle.all_logits_graph)
    assert set(smooth(model, groups, {name: 0 * rows for name, rows in samples.items()}).values()) == {0}
    assert not list(recwarn)


@pytest.mark.parametrize("factor", [1.5, np.nan])
def test_smoothing_that_changes_the_logits_is_not_taken(factor, exported, monkeypatch, tmp_path):
    made = exported("llama").bundle
    bundle = Bundle(Path(shutil.copytree(made.path, tmp_path / "llama")), made.manifest)

    def wrong(model, *_):
        value = model.graph.initializers["model.layers.0.self_attn.q_proj.weight"]
        value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(factor), name=value.name)

    monkeypatch.setattr(calibration, "smooth", wrong)
    listener, graph = Recorder(SILENT), bundle.all_logits_graph
    out = tmp_path / "calibrated.onnx"
    assert calibration.calibrated(bundle, [np.arange(40)], out, listener) == graph
    (warning,) = listener.warnings
    assert warning.startswith("smoothing changed the logits")
    assert not out.exists()
    assert not [path for path in graph.parent.iterdir() if path.name.startswith(("probe", "segment"))]


def test_channels_of_other_sizes_cost_int8_less(tmp_path, computed):
    """Outliers as trained decoders have them: a norm's weight that is 40 times its neighbours'."""
    module = llama()
    with torch.no_grad():
        for layer in module.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[::32] *= 40
    graph = exported_graph(module, tmp_path)
    expected, plain, (changed, chosen) = computed(ir.load(graph), IDS), ir.load(graph), smoothed(graph)
    assert max(chosen.values()) > 0
    quantize(plain)
    quantize(changed)
    before, after = (kl_divergence(expected, computed(model, IDS)) for model in (plain, changed))
    assert after < before / 3


# --- which activations are smoothed, and by which weights: rules 1 to 4, and what keeps each from holding -------------
RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


WEIGHTS = {"gate": draw(8, 16), "up": draw(8, 16), "down": draw(16, 8), "b": draw(16), "n": draw(16)}
WEIGHTS |= {"ff": draw(4, 4), "f": draw(4), "apart": np.array([0, 0, 4, 4]), "together": np.array([0, 0, 16])}
INPUTS = "float[1,T,8] x, float[8,16] gate, float[8,16] up, float[16,8] down, float[16] b, float[16] n"
INPUTS += ", float[4,4] ff, float[4] f, int64[4] apart, int64[3] together"


def require_unchanged(model, group, **feeds):
    """Smoothing a group, whose activations have channels of other sizes, leaves the outputs as they are."""
    expected, channels = run_model(model, **feeds)[0], group.readers[0].channels
    before = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    smooth(model, [group], {group.activation: draw(50, channels) * np.exp(draw(channels))})
    stored = model.graph.initializers
    assert any(not np.array_equal(array, stored[name].const_value.numpy()) for name, array in before.items())
    np.testing.assert_allclose(run_model(model, **feeds)[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def names_of(weights: tuple[ChannelWeight, ...]) -> list[tuple[str, int]]:
    """Each weight's name, and its axis of channels."""
    return [(str(found.node.inputs[found.index].name), found.axis) for found in weights]


MADE = {
    "gated": ("g = MatMul(x, gate) s = Sigmoid(g) u = MatMul(x, up) h = Mul(s, u)", ["up"], ["up", "gate"]),
    "bias": ("u = MatMul(x, up) h = Add(u, b)", ["b", "up"], ["up", "b"]),
    "vector": ("u = MatMul(x, up) h = Mul(u, n)", ["n"], ["up", "n"]),
    "gelu": ("u = MatMul(x, up) h = Gelu(u)", [], ["up"]),
    "norm": ("u = MatMul(x, up) h = LayerNormalization(u, n, b)", ["n", "b"], []),
    "twice": ("u = MatMul(x, up) h = Add(u, u)", [], ["up"]),
    "two products": ("u = MatMul(x, up) h = MatMul(u, sq)", ["sq"], ["sq"]),
    "regrouped": ("u = MatMul(x, up) r = Reshape(u, apart) h = Reshape(r, together)", ["up"], []),
}


@pytest.mark.parametrize(("body", "divided", "permuted"), MADE.values(), ids=MADE)
def test_what_makes_the_channels(body, divided, permuted):
    square = draw(16, 16)
    text = f"g ({INPUTS}, float[16,16] sq) => (float[1,T,8] y) {{ {body} y = MatMul(h, down) }}"
    model = model_of(text, **WEIGHTS, sq=square)
    group = next(group for group in find_groups(model) if group.activation == "h")
    assert names_of(group.readers) == [("down", 0)]
    axes = {name: 1 if WEIGHTS.get(name, square).ndim == 2 else -1 for name in (*divided, *permuted)}
    assert names_of(group.divided) == [(name, axes[name]) for name in divided]
    assert names_of(group.permuted) == [(name, axes[name]) for name in permuted]
    assert (group.heads, group.shared_by, group.rotatable) == (0, 1, False)
    require_unchanged(model, group, x=draw(1, 9, 8))


GROUPED = "u = MatMul(x, up) r = Reshape(u, apart) m = {} h = Reshape(m, together) y = MatMul(h, down) z = Neg(x)"
IN_NO_GROUP = {
    "activation read elsewhere": "h = MatMul(x, up) y = MatMul(h, down) z = Neg(h)",
    "producer read elsewhere": "u = MatMul(x, up) h = Sigmoid(u) y = MatMul(h, down) z = Neg(u)",
    "not elementwise": "u = MatMul(x, up) h = Softmax(u) y = MatMul(h, down) z = Neg(x)",
    "producer shared": "h = MatMul(x, up) y = MatMul(h, down) v = Transpose <perm = [1, 0]> (up) z = MatMul(x, up)",
    "reader shared": "h = MatMul(x, up) y = MatMul(h, down) z = Add(y, down)",
    "factors of groups": GROUPED.format("Mul(r, ff)"),
    "products of groups": GROUPED.format("MatMul(r, ff)"),
    "norms of groups": GROUPED.format("SimplifiedLayerNormalization(r, f)"),
}


@pytest.mark.parametrize("name", IN_NO_GROUP)
def test_what_something_else_reads_is_in_no_group(name):
    model = model_of(f"g ({INPUTS}) => (float[1,T,8] y, float[1,T,N] z) {{ {IN_NO_GROUP[name]} }}", **WEIGHTS)
    assert [group for group in find_groups(model) if group.activation == "h"] == []


@pytest.mark.parametrize(
    ("values", "divided", "rotatable"),
    [
        ("v = MatMul(x, w)", ["w"], True),
        ("m = MatMul(x, w) v = Add(m, c)", ["c", "w"], True),
        ("m = MatMul(x, w) v = Mul(m, c)", ["c"], False),
        ("m = MatMul(x, w) v = SimplifiedLayerNormalization(m, c)", ["c"], False),
        ("v = MatMul(x, w) z = Identity(v)", None, False),
    ],
    ids=["matmul", "bias", "vector", "norm", "values_read_elsewhere"],
)
def test_values_are_divided_and_rotated_behind_their_projection(values, divided, rotatable):
    inputs = "float[1,T,8] x, float[1,T,32] q, float[1,T,16] k, float[1,2,P,8] past_k, float[1,2,P,8] past_v"
    inputs += ", int32[1] seqlens, int32[1] total, float[8,16] w, float[16] c, float[32,8] o"
    attention = "com.microsoft.GroupQueryAttention <num_heads: int = 4, kv_num_heads: int = 2>"
    model = model_of(
        f"g ({inputs}) => (float[1,T,8] y) {{ {values}"
        f" a, pk, pv = {attention} (q, k, v, past_k, past_v, seqlens, total) y = MatMul(a, o) }}",
        w=draw(8, 16),
        c=draw(16),
        o=draw(32, 8),
    )
    groups = {group.activation: group for group in find_groups(model)}
    assert ("a" in groups) == (divided is not None)
    if divided is not None:
        group = groups["a"]
        assert names_of(group.divided) == [(name, 1 if name == "w" else -1) for name in divided]
        assert (group.heads, group.shared_by, group.rotatable, group.permuted) == (4, 2, rotatable, ())
        lengths = {"seqlens": np.array([8], np.int32), "total": np.array(9, np.int32).reshape(1)}
        feeds = {"x": draw(1, 9, 8), "q": draw(1, 9, 32), "k": draw(1, 9, 16)} | lengths
        require_unchanged(model, group, **feeds, past_k=draw(1, 2, 0, 8), past_v=draw(1, 2, 0, 8))

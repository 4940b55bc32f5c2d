"""Smoothing changes no MatMul's result, and makes int8 better where channels differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

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
from ...plain_loop import run_chunks
from ...small_graphs import model_of


def smoothed(graph: Path, ids: list[int], out: Path) -> tuple[ir.Model, dict[str, float]]:
    """The smoothed graph, written to `out`, and the exponents."""
    model = ir.load(graph)
    groups = find_groups(model)
    with probing(model, graph.parent, [group.activation for group in groups]) as probe:
        samples = probe(np.array(ids))
    chosen = smooth(model, groups, samples)
    ir.save(model, out, external_data=f"{out.name}_data")
    return model, chosen


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("llama", 8),  # per layer: q k v, o (two query heads to a value head), gate and up, down; the head is tied
        ("gpt2", 9),  # per layer: q k v, o, the MLP's two (GELU lets channels be permuted, no more); the head
        ("nano_gpt", 3),  # q, k, v are one MatMul, so that the values have none of their own; the head is tied
    ],
)
def test_smoothing_changes_no_logits(name, groups, exported, tmp_path):
    made = exported(name)
    graph = made.bundle.all_logits_graph
    (ids,) = (t.tolist() for t in self_generated_texts(Engine(made.bundle), 0, 1, made.bundle.manifest.context_length))
    found = find_groups(ir.load(graph))
    assert len(found) == groups > 0, [group.activation for group in found]
    expected = run_chunks(graph, [ids])
    _, chosen = smoothed(graph, ids, tmp_path / "smoothed.onnx")
    assert set(chosen) == {group.activation for group in found}
    assert relative_difference(expected, run_chunks(tmp_path / "smoothed.onnx", [ids])) < 5e-6


def test_weights_that_have_several_places_are_in_no_group(exported):
    assert find_groups(ir.load(exported("one_block_twice").bundle.all_logits_graph)) == []


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_channels_between_two_products_are_put_in_the_order_of_their_size(name, exported, tmp_path):
    """One activation of each of two layers' MLPs; GPT-2's first projection has a bias, which moves along."""
    graph = exported(name).bundle.all_logits_graph
    model = ir.load(graph)
    groups = [group for group in find_groups(model) if group.permuted]
    assert len(groups) == 2
    wanted = [group.activation for group in groups]
    ids = np.random.default_rng(0).integers(0, 61, 40)
    with probing(model, graph.parent, wanted) as probe:
        before = probe(ids)
    smoothed(graph, ids.tolist(), tmp_path / "smoothed.onnx")
    with probing(ir.load(tmp_path / "smoothed.onnx"), tmp_path, wanted) as probe:
        after = probe(ids)
    for name in wanted:
        sizes = np.abs(after[name] / np.sqrt(np.square(before[name]).mean(1, keepdims=True))).max(0)
        assert (np.diff(sizes) > -1e-4 * sizes.max()).all()
        assert not (np.diff(np.abs(before[name]).max(0)) >= 0).all()


class PerHead(nn.Module):
    """Something between a MatMul and the next one that treats channels in groups of 16, or of its own shape."""

    def __init__(self, inner: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (-1, 16))
        if not isinstance(self.inner, nn.Module):
            return (groups * self.inner).flatten(2)
        return self.inner(groups).flatten(2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "between"),
    [
        pytest.param("self_attn.o_proj", lambda: PerHead(nn.Linear(16, 16, bias=False)), marks=pytest.mark.matrix),
        ("self_attn.o_proj", lambda: PerHead(nn.Parameter(torch.rand(4, 16) + 0.5))),
        pytest.param("mlp.down_proj", lambda: PerHead(nn.RMSNorm(16)), marks=pytest.mark.matrix),
    ],
)
def test_channels_that_are_regrouped_on_the_way_stay_as_they_are(place, between, tmp_path):
    module = llama()
    for layer in module.model.layers:
        parent, name = place.split(".")
        owner = layer.get_submodule(parent)
        setattr(owner, name, nn.Sequential(between(), owner.get_submodule(name)))
    graph = export(module, tmp_path / "fp32", precision="fp32", context_length=40).path / "onnx" / "model.onnx"
    ids = np.random.default_rng(0).integers(0, 61, 40).tolist()
    smoothed(graph, ids, tmp_path / "smoothed.onnx")
    assert relative_difference(run_chunks(graph, [ids]), run_chunks(tmp_path / "smoothed.onnx", [ids])) < 5e-6
    report = export(module, tmp_path / "int8", context_length=40)
    assert report.manifest.quality["kl_divergence"] < 0.02


@pytest.mark.slow
def test_values_behind_a_norm_are_smoothed_without_a_rotation(tmp_path):
    """The norm's weights are each a channel's, so that channels cannot be mixed behind it."""
    module = llama()
    for layer in module.model.layers:
        attention = layer.self_attn
        norm = nn.RMSNorm(attention.v_proj.out_features)
        norm.weight.data = torch.linspace(0.5, 1.5, len(norm.weight))
        attention.v_proj = nn.Sequential(attention.get_submodule("v_proj"), norm)
    graph = export(module, tmp_path / "fp32", precision="fp32", context_length=40).path / "onnx" / "model.onnx"
    ids = np.random.default_rng(0).integers(0, 61, 40).tolist()
    _, chosen = smoothed(graph, ids, tmp_path / "smoothed.onnx")
    assert len(chosen) == 8  # o_proj's two activations are among them
    assert relative_difference(run_chunks(graph, [ids]), run_chunks(tmp_path / "smoothed.onnx", [ids])) < 5e-6


@pytest.mark.parametrize("number", [0.0, 1e-45, 3e38])
@pytest.mark.parametrize("projection", ["q_proj", "down_proj", "v_proj"])
def test_weights_without_any_size_to_go_by_are_left_as_they_are(projection, number, exported, recwarn):
    """A layer that was switched off, numbers that cannot be divided by, and one that overflows when it is scaled."""
    made = exported("llama")
    model = ir.load(made.bundle.all_logits_graph)
    groups = find_groups(model)
    with probing(model, made.bundle.all_logits_graph.parent, [group.activation for group in groups]) as probe:
        samples = probe(np.arange(40))
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
    made = exported("llama")
    model = ir.load(made.bundle.all_logits_graph)
    groups = find_groups(model)
    with probing(model, made.bundle.all_logits_graph.parent, [group.activation for group in groups]) as probe:
        samples = {name: rows * 0 for name, rows in probe(np.arange(40)).items()}
    assert set(smooth(model, groups, samples).values()) == {0}
    assert not list(recwarn)


@pytest.mark.parametrize("factor", [1.5, np.nan])
def test_smoothing_that_changes_the_logits_is_not_taken(factor, exported, monkeypatch, tmp_path):
    made = exported("llama")

    def wrong(model: ir.Model, *_: object) -> None:
        value = model.graph.initializers["model.layers.0.self_attn.q_proj.weight"]
        value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(factor), name=value.name)

    monkeypatch.setattr(calibration, "smooth", wrong)
    listener, graph = Recorder(SILENT), made.bundle.all_logits_graph
    out = tmp_path / "calibrated.onnx"
    assert calibration.calibrated(made.bundle, [np.arange(40)], out, listener) == graph
    assert len(listener.warnings) == 1
    assert listener.warnings[0].startswith("smoothing changed the logits")
    assert not list(tmp_path.iterdir())
    assert not [path for path in graph.parent.iterdir() if path.name.startswith(("probe", "segment"))]


def test_channels_of_other_sizes_cost_int8_less(tmp_path):
    """Outliers as trained decoders have them: a norm's weight that is 40 times its neighbours'."""
    module = llama()
    with torch.no_grad():
        for layer in module.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[::32] *= 40
    report = export(module, tmp_path / "fp32", precision="fp32", context_length=40)
    graph = report.path / "onnx" / "model.onnx"
    ids = np.random.default_rng(0).integers(0, 61, 40).tolist()
    expected = run_chunks(graph, [ids])
    plain = ir.load(graph)
    quantize(plain)
    ir.save(plain, tmp_path / "plain.onnx", external_data="plain.onnx_data")
    changed, chosen = smoothed(graph, ids, tmp_path / "smoothed.onnx")
    assert max(chosen.values()) > 0
    quantize(changed)
    ir.save(changed, tmp_path / "int8.onnx", external_data="int8.onnx_data")
    before, after = (
        kl_divergence(expected, run_chunks(tmp_path / name, [ids])) for name in ("plain.onnx", "int8.onnx")
    )
    assert after < before / 3


# --- which activations are smoothed, and by which weights: rules 1 to 4, and what keeps each from holding -------------
RNG = np.random.default_rng(0)
WEIGHTS = {
    name: RNG.normal(size=shape).astype(np.float32)
    for name, shape in {"gate": (8, 16), "up": (8, 16), "down": (16, 8), "b": (16,), "n": (16,), "head": (4,)}.items()
}
INPUTS = "float[1,T,8] x, float[8,16] gate, float[8,16] up, float[16,8] down, float[16] b, float[16] n, float[4] head"


def names_of(weights: tuple[ChannelWeight, ...]) -> list[tuple[str, int]]:
    """Each weight's name, and its axis of channels."""
    return [(str(found.node.inputs[found.index].name), found.axis) for found in weights]


@pytest.mark.parametrize(
    ("body", "divided", "permuted"),
    [
        ("g = MatMul(x, gate) s = Sigmoid(g) u = MatMul(x, up) h = Mul(s, u)", ["up"], ["up", "gate"]),
        ("u = MatMul(x, up) h = Add(u, b)", ["b", "up"], ["up", "b"]),
        ("u = MatMul(x, up) h = Mul(u, n)", ["n"], ["up", "n"]),
        ("u = MatMul(x, up) h = Gelu(u)", [], ["up"]),
        ("u = MatMul(x, up) h = LayerNormalization(u, n, b)", ["n", "b"], []),
        ("u = MatMul(x, up) h = Add(u, u)", [], ["up"]),
        ("u = MatMul(x, up) h = MatMul(u, sq)", ["sq"], ["sq"]),
    ],
    ids=["gated", "bias", "vector", "gelu", "norm", "twice", "two_products"],
)
def test_what_makes_the_channels(body, divided, permuted):
    square = RNG.normal(size=(16, 16)).astype(np.float32)
    text = f"g ({INPUTS}, float[16,16] sq) => (float[1,T,8] y) {{ {body} y = MatMul(h, down) }}"
    group = next(group for group in find_groups(model_of(text, **WEIGHTS, sq=square)) if group.activation == "h")
    assert names_of(group.readers) == [("down", 0)]
    axes = {name: 1 if WEIGHTS.get(name, square).ndim == 2 else -1 for name in (*divided, *permuted)}
    assert names_of(group.divided) == [(name, axes[name]) for name in divided]
    assert names_of(group.permuted) == [(name, axes[name]) for name in permuted]
    assert (group.heads, group.shared_by, group.rotatable) == (0, 1, False)


@pytest.mark.parametrize(
    "body",
    [
        "h = MatMul(x, up) y = MatMul(h, down) z = Neg(h)",
        "u = MatMul(x, up) h = Sigmoid(u) y = MatMul(h, down) z = Neg(u)",
        "u = MatMul(x, up) h = Softmax(u) y = MatMul(h, down) z = Neg(x)",
        "h = MatMul(x, up) y = MatMul(h, down) v = Transpose <perm = [1, 0]> (up) z = MatMul(x, up)",
        "h = MatMul(x, up) y = MatMul(h, down) z = Add(y, down)",
    ],
    ids=["activation_read_elsewhere", "producer_read_elsewhere", "not_elementwise", "producer_shared", "reader_shared"],
)
def test_what_something_else_reads_is_in_no_group(body):
    model = model_of(f"g ({INPUTS}) => (float[1,T,8] y, float[1,T,N] z) {{ {body} }}", **WEIGHTS)
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
        w=RNG.normal(size=(8, 16)).astype(np.float32),
        c=RNG.normal(size=16).astype(np.float32),
        o=RNG.normal(size=(32, 8)).astype(np.float32),
    )
    groups = {group.activation: group for group in find_groups(model)}
    assert ("a" in groups) == (divided is not None)
    if divided is not None:
        group = groups["a"]
        assert names_of(group.divided) == [(name, 1 if name == "w" else -1) for name in divided]
        assert (group.heads, group.shared_by, group.rotatable, group.permuted) == (4, 2, rotatable, ())

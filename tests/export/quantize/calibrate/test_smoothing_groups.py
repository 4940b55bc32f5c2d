"""Which activations are smoothed, and by which weights: rules 1 to 4, and what keeps each from holding."""

from __future__ import annotations

import numpy as np
import pytest

from pastkey.export.quantize.calibrate.smoothing_groups import ChannelWeight, find_groups

from ...small_graphs import model_of

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

"""The native graph has the kernel library's operators instead of onnxruntime's, and computes the same."""

import importlib.util

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.contract import names
from pastkey.export.graph.write import weights_file
from pastkey.export.graph.write.last_logits import keep_last_positions
from pastkey.export.graph.write.native import to_native
from pastkey.export.graph.write.output_head import take_head
from pastkey.export.quantize.rounding.int4_blocks import round_to_nearest
from pastkey.export.quantize.rounding.rewrite import quantize
from pastkey.runtime.providers.ort import onnxruntime

from ...small_graphs import model_of, run_model

BUILT = importlib.util.find_spec("pastkey_kernels") is not None
RNG = np.random.default_rng(0)
K, N = 64, 96
SIZES = {"w": (K, N), "v": (K, K), "b": (N,), "g": (K,)}
WEIGHTS = {name: RNG.normal(size=size).astype(np.float32) for name, size in SIZES.items()}
WEIGHTS["halves"] = np.array([N // 2, N // 2])
TEXT = f"""g (float[batch_size,sequence_length,{K}] x, float[{K},{N}] w, float[{K},{K}] v, float[{N}] b, float[{K}] g,
int64[2] halves) => (float[batch_size,sequence_length,n] y) {{{{ {{}} }}}}"""
MATMUL, NORM = "MatMulInt8", "NormMatMulInt8"
HALVES = "p = MatMul(x, w) i, j = Split <axis = -1> (p, halves)"


TAKEN = {  # the computation of a node and those around it -> its operator and attributes
    "y = MatMul(x, w)": (MATMUL, {}),
    "p = MatMul(x, w) y = Add(p, b)": (MATMUL, {}),
    "p = MatMul(x, w) s = Sigmoid(p) y = Mul(p, s)": (MATMUL, {"activation": "silu"}),
    "p = MatMul(x, w) q = Add(p, b) y = Gelu(q)": (MATMUL, {"activation": "gelu"}),
    f"{HALVES} s = Sigmoid(i) a = Mul(i, s) y = Mul(a, j)": (MATMUL, {"activation": "silu", "gate": 0}),
    f'{HALVES} a = Gelu <approximate = "tanh"> (j) y = Mul(i, a)': (MATMUL, {"activation": "gelu_tanh", "gate": 1}),
    "n = LayerNormalization <epsilon = 0.01> (x, g, g) y = MatMul(n, w)": (NORM, {"norm": "layer"}),
    "n = SimplifiedLayerNormalization <epsilon = 0.01> (x, g) y = MatMul(n, w)": (NORM, {"norm": "rms"}),
    "r = Neg(x) n, e, f, s = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.01> (x, r, g) "
    "p = MatMul(n, w) q = MatMul(s, w) y = Add(p, q)": (NORM, {"norm": "rms"}),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("body", TAKEN)
def test_a_node_takes_in_what_stands_around_it(body, bits):
    operator, attributes = TAKEN[body]
    model = model_of(TEXT.format(body), **WEIGHTS)
    quantize(model, blocks={"w": round_to_nearest(WEIGHTS["w"].T, 32)} if bits == 4 else {})
    x = RNG.normal(size=(2, 3, K)).astype(np.float32)
    (expected,) = run_model(model, x=x)
    assert to_native(model)
    node = next(node for node in model.graph if node.op_type == operator)
    found = {name: attribute.value for name, attribute in node.attributes.items()}
    assert found.pop("epsilon", None) == (pytest.approx(0.01) if operator == NORM else None)
    assert found == attributes | {"version": names.NATIVE_OPERATORS} | ({"bits": 4} if bits == 4 else {})
    assert node.domain == names.NATIVE_DOMAIN
    assert not {"MatMulNBits", "Sigmoid", "Gelu"} & {node.op_type for node in model.graph}
    if BUILT:
        np.testing.assert_allclose(_run_native(model, x=x)[0], expected, rtol=2e-5, atol=2e-4)


def _run_native(model, **inputs):
    import pastkey_kernels

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(pastkey_kernels.library_path())
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return session.run(None, inputs)


@pytest.mark.parametrize(
    "body",
    [
        "p = MatMul(x, w) s = Sigmoid(p) a = Mul(p, s) y = Add(a, p)",  # the product is read once more
        "n = SimplifiedLayerNormalization (x, g) p = MatMul(n, w) q = Neg(n) r = MatMul(q, w) y = Add(p, r)",
    ],
)
def test_what_others_read_stays(body):
    model = model_of(TEXT.format(body), **WEIGHTS)
    quantize(model)
    before = [node.op_type for node in model.graph if node.op_type in ("Sigmoid", "SimplifiedLayerNormalization")]
    to_native(model)
    assert {node.op_type for node in model.graph} >= {*before, MATMUL}


def test_both_terms_of_the_head_are_one_node():
    model = model_of(TEXT.replace("] y)", "] logits)").format("h = Neg(x) logits = MatMul(h, w)"), **WEIGHTS)
    quantize(model)
    keep_last_positions(model, take_head(model))
    x = RNG.normal(size=(2, 3, K)).astype(np.float32)
    inputs = {"x": x, names.LOGITS_START: np.array([-2])}
    (expected,) = run_model(model, **inputs)
    to_native(model)
    operators = [node.op_type for node in model.graph]
    assert operators == ["Neg", "Slice", MATMUL]
    assert model.graph[2].attributes["terms"].value == 2
    if BUILT:
        np.testing.assert_allclose(_run_native(model, **inputs)[0], expected, rtol=2e-5, atol=2e-4)


def test_scales_are_read_where_they_lie(tmp_path, monkeypatch):
    """Two matrices share a table of scales in the weights file: each node has its own rows of it."""
    model = model_of(TEXT.format("p = MatMul(x, v) y = MatMul(p, w)"), **WEIGHTS)
    quantize(model)
    inline = [value for value in model.graph.initializers.values() if "scale" in str(value.name)]
    monkeypatch.setattr(weights_file, "INLINE_BYTES", 0)  # though they are small
    file = weights_file.WeightsFile.of(tmp_path / "model.onnx")
    for value in inline:
        file.take_weight(value)
    stored = {str(value.name): value.const_value.numpy() for value in inline}
    to_native(model)
    first, second = (node for node in model.graph if node.op_type == MATMUL)
    for place, what in ((2, "scale_codes"), (3, "row_scales")):
        (whole,) = (array for name, array in stored.items() if what in name)
        parts = [node.inputs[place].const_value for node in (first, second)]
        assert all(isinstance(part, ir.ExternalTensor) for part in parts)
        np.testing.assert_array_equal(np.concatenate([part.numpy() for part in parts]), whole)


@pytest.mark.parametrize(("size", "taken"), [(16, True), (24, False)])
def test_states_have_kernels_where_their_sizes_are_multiples_of_16(size, taken):
    wide = 3 * size
    model = model_of(
        f"""g (float[b,t,{wide}] x, float[{wide},1,3] w, float[b,{wide},2] old, float[b,1,{size},{size}] before,
        float[b,t,1] decay, int64[3] parts)
        => (float[b,t,{size}] y, float[b,{wide},2] new, float[b,1,{size},{size}] after)
        {{ a = Transpose <perm = [0, 2, 1]> (x)
        c, new = com.microsoft.CausalConvWithState <activation = "silu"> (a, w, "", old)
        d = Transpose <perm = [0, 2, 1]> (c)
        q, k, v = Split <axis = -1> (d, parts)
        y, after = com.microsoft.LinearAttention <q_num_heads = 1, kv_num_heads = 1, update_rule = "gated">
            (q, k, v, before, decay) }}""",
        w=RNG.normal(size=(wide, 1, 3)).astype(np.float32),
        parts=np.array([size] * 3),
    )
    sizes = {"x": (2, 5, wide), "old": (2, wide, 2), "before": (2, 1, size, size), "decay": (2, 5, 1)}
    feeds = {name: -np.abs(RNG.normal(size=shape)).astype(np.float32) for name, shape in sizes.items()}
    expected = run_model(model, **feeds)
    assert to_native(model) == taken
    assert ("Transpose" in {node.op_type for node in model.graph}) != taken
    if BUILT and taken:
        for found, right in zip(_run_native(model, **feeds), expected, strict=True):
            np.testing.assert_allclose(found, right, rtol=2e-5, atol=2e-5)


def test_a_matrix_in_blocks_of_16_stays():
    model = model_of("g (float[m,48] x, float[48,9] w) => (float[m,9] y) { y = MatMul(x, w) }", w=np.ones((48, 9), "f"))
    quantize(model)
    assert [node.op_type for node in model.graph if node.op_type.startswith("MatMul")] == ["MatMulNBits"]
    assert not to_native(model)

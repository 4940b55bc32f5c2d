"""The graph that is shipped: names, axes, weights stored once, and nothing of the machine that made it."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from pastkey.export.graph.clean import fold_transposed_weights, merge_equal_weights, share_transposed_weights
from pastkey.export.graph.edit import weight

from ..small_graphs import model_of

CHECKOUT = Path(__file__).resolve().parents[3]


@pytest.fixture(params=["one_block_twice", "llama"])
def made(request, exported):
    return exported(request.param)


def axes(value):
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


# --- inputs and outputs -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("last", [False, True], ids=["common", "last"])
def test_every_axis_has_its_designed_name_or_number(made, last):
    graph = made.graph(last=last).graph
    expected = {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        "logits": ["batch_size", "logits_to_keep" if last else "sequence_length", made.bundle.manifest.vocab_size],
    }
    if last:
        expected["logits_start"] = [1]
    if last and made.bundle.manifest.graph == "fused":
        del expected["attention_mask"]
        expected |= {"seqlens_k": ["batch_size"], "total_sequence_length": []}
    for i, layer in enumerate(made.bundle.manifest.layers):
        for kind, size in (("key", layer.key_head_size), ("value", layer.value_head_size)):
            expected[f"past_key_values.{i}.{kind}"] = ["batch_size", layer.kv_heads, "past_sequence_length", size]
            expected[f"present.{i}.{kind}"] = ["batch_size", layer.kv_heads, "total_sequence_length", size]
    assert {value.name: axes(value) for value in [*graph.input, *graph.output]} == expected
    order = [value.name for value in graph.input]
    assert order[:3] == ["input_ids", "attention_mask", "position_ids"] or last
    assert "past_key_values.0.key past_key_values.0.value" in " ".join(order)
    assert [value.name for value in graph.output][:3] == ["logits", "present.0.key", "present.0.value"]


def test_ids_are_int64_and_everything_else_is_float(made):
    graph = made.graph().graph
    ids = {"input_ids", "attention_mask", "position_ids"}
    for value in [*graph.input, *graph.output]:
        wanted = onnx.TensorProto.INT64 if value.name in ids else onnx.TensorProto.FLOAT
        assert value.type.tensor_type.elem_type == wanted, value.name


# --- nothing of the machine ---------------------------------------------------------------------------------------
def test_no_byte_of_a_graph_tells_where_it_was_made(made):
    for path in (made.bundle.all_logits_graph, made.bundle.last_logits_graph):
        content = path.read_bytes()
        for trace in (str(CHECKOUT).encode(), b"torch", b"/home", b"/usr", b"/tmp", b".py", b"site-packages", b"aten"):
            assert trace not in content, trace


@pytest.mark.parametrize("last", [False, True], ids=["all_logits", "last_logits"])
def test_metadata_doc_strings_and_inferred_shapes_are_gone(made, last):
    model = made.graph(last=last)
    assert (model.producer_name, model.producer_version, model.doc_string) == ("pastkey", "", "")
    assert not model.metadata_props
    assert not model.functions
    assert not model.graph.metadata_props
    weights = {tensor.name for tensor in model.graph.initializer}
    assert {value.name for value in model.graph.value_info} <= weights  # no intermediate value
    for item in [*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer]:
        assert not item.doc_string
        assert not item.metadata_props


# --- operators ----------------------------------------------------------------------------------------------------


def test_the_standard_graph_is_valid_onnx_of_the_standard_domain_only(exported):
    for name in ("head_size_10_context_11", "one_block_twice"):
        made = exported(name)
        onnx.checker.check_model(str(made.bundle.all_logits_graph), full_check=True)
        assert {node.domain for node in made.graph().graph.node} == {""}
        assert {o.domain for o in made.graph().opset_import} == {""}


def test_the_fused_graph_has_one_attention_operator_per_layer(exported):
    for name in ("llama", "gpt2"):
        made = exported(name)
        nodes = [node for node in made.graph().graph.node if node.op_type == "GroupQueryAttention"]
        assert len(nodes) == len(made.bundle.manifest.layers)
        assert {node.domain for node in nodes} == {"com.microsoft"}
        assert "Softmax" not in {node.op_type for node in made.graph().graph.node}
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[0].attribute}
    assert attributes["num_heads"] == attributes["kv_num_heads"] == 4


# --- weights ------------------------------------------------------------------------------------------------------
def test_weights_carry_the_modules_names(made):
    known = dict([*made.module.named_parameters(), *made.module.named_buffers()])
    stored = {name: array for name, array in made.weights().items() if array.size > 16}
    stored = {name: array for name, array in stored.items() if not name.startswith(("cos_cache", "sin_cache"))}
    assert stored
    for name, array in stored.items():
        assert name in known, name
        tensor = known[name].detach().numpy()
        assert any(array.shape == form.shape and np.array_equal(array, form) for form in (tensor, tensor.T)), name


def test_no_two_initializers_are_equal(made):
    seen = [(array.dtype, array.shape, array.tobytes()) for array in made.weights().values()]
    assert len(seen) == len(set(seen))


def test_a_tied_head_is_stored_once(exported):
    made = exported("llama")
    weights = made.weights()
    assert "model.embed_tokens.weight" in weights
    assert sum(61 in array.shape and 48 in array.shape for array in weights.values()) == 1
    assert sum(61 in array.shape for array in exported("gpt2").weights().values()) == 2


def test_both_graphs_read_the_same_bytes(made):
    def places(last):
        external = {}
        for tensor in made.graph(last=last).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                external[tensor.name] = {entry.key: entry.value for entry in tensor.external_data}
        return external

    common, last = places(False), places(True)
    assert common == last
    assert common
    assert {place["location"] for place in common.values()} == {"model.onnx_data"}


# --- single passes ------------------------------------------------------------------------------------------------
MATRIX = np.arange(12, dtype=np.float32).reshape(3, 4)


def test_equal_weights_become_one_and_different_ones_stay():
    other = MATRIX.copy()
    other[2, 3] = -1
    model = model_of(
        "g (float[3,4] a, float[3,4] b, float[3,4] c, float[3,4] x) => (float[3,4] y)"
        " { s = Add(a, b) t = Add(c, x) y = Add(s, t) }",
        a=MATRIX, b=MATRIX.copy(), c=other,
    )  # fmt: skip
    merge_equal_weights(model)
    assert sorted(model.graph.initializers) == ["a", "c"]
    assert [value.name for value in model.graph[0].inputs] == ["a", "a"]


def test_equal_content_of_another_type_or_shape_is_not_merged():
    model = model_of(
        "g (float[12] a, float[3,4] b, int32[12] c) => (float[12] y)"
        " { d = Cast <to = 1> (c) e = Add(a, d) f = Reshape(b, s) y = Add(e, f) }".replace("s)", "c)"),
        a=np.arange(12, dtype=np.float32), b=MATRIX, c=np.arange(12, dtype=np.int32),
    )  # fmt: skip
    merge_equal_weights(model)
    assert sorted(model.graph.initializers) == ["a", "b", "c"]


def test_a_head_that_is_the_embedding_transposed_reads_the_embedding():
    model = model_of(
        "g (float[3,4] e, float[4,3] h, int64[2] i) => (float[2,3] y) { x = Gather(e, i) y = MatMul(x, h) }",
        e=MATRIX, h=np.ascontiguousarray(MATRIX.T),
    )  # fmt: skip
    share_transposed_weights(model)
    assert list(model.graph.initializers) == ["e"]
    assert [node.op_type for node in model.graph] == ["Transpose", "Gather", "MatMul"]


def test_a_transposed_weight_is_folded_only_where_nothing_else_reads_it():
    text = "g (float[3,4] w, float[2,4] x) => (float[2,3] y) {{ t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t){} }}"
    model = model_of(text.format(""), w=MATRIX)
    fold_transposed_weights(model)
    assert [node.op_type for node in model.graph] == ["MatMul"]
    np.testing.assert_array_equal(weight(model.graph[0].inputs[1]), MATRIX.T)
    shared = model_of(text.format(" u = Identity(w)"), w=MATRIX)
    fold_transposed_weights(shared)
    assert [node.op_type for node in shared.graph] == ["Transpose", "MatMul", "Identity"]

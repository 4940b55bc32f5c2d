"""The graph that is shipped: names, axes, weights stored once, and nothing of the machine that made it."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from pastkey.export.graph.clean import fold_transposed_weights, merge_equal_weights, share_transposed_weights
from pastkey.export.graph.edit import weight

from ..small_graphs import model_of

CHECKOUT = Path(__file__).resolve().parents[3]
INT32, INT64, FLOAT = onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.FLOAT


@pytest.fixture(params=["one_block_twice", "llama"])
def made(request, exported):
    return exported(request.param)


def form(value):
    kind = value.type.tensor_type
    return kind.elem_type, [d.dim_param or d.dim_value for d in kind.shape.dim]


# --- inputs and outputs -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("last", [False, True], ids=["common", "last"])
def test_every_input_and_output_has_its_designed_type_and_axes(made, last):
    graph, manifest = made.graph(last=last).graph, made.bundle.manifest
    kept = "logits_to_keep" if last else "sequence_length"
    expected = {
        "input_ids": (INT64, ["batch_size", "sequence_length"]),
        "attention_mask": (INT64, ["batch_size", "total_sequence_length"]),
        "position_ids": (INT64, ["batch_size", "sequence_length"]),
        "logits": (FLOAT, ["batch_size", kept, manifest.vocab_size]),
    }
    if last:
        expected["logits_start"] = (INT64, [1])
    if last and manifest.graph == "fused":
        del expected["attention_mask"]
        expected |= {"seqlens_k": (INT32, ["batch_size"]), "total_sequence_length": (INT32, [])}
        assert not {"ReduceSum", "Shape"} & {node.op_type for node in graph.node}  # which count the mask
    for i, layer in enumerate(manifest.layers):
        for kind, size in (("key", layer.key_head_size), ("value", layer.value_head_size)):
            for name, axis in (("past_key_values", "past_sequence_length"), ("present", "total_sequence_length")):
                expected[f"{name}.{i}.{kind}"] = (FLOAT, ["batch_size", layer.kv_heads, axis, size])
    assert {value.name: form(value) for value in [*graph.input, *graph.output]} == expected
    order = [value.name for value in graph.input]
    assert order[:3] == ["input_ids", "attention_mask", "position_ids"] or last
    assert "past_key_values.0.key past_key_values.0.value" in " ".join(order)
    assert [value.name for value in graph.output][:3] == ["logits", "present.0.key", "present.0.value"]


@pytest.mark.parametrize("last", [False, True], ids=["all_logits", "last_logits"])
def test_nothing_tells_where_and_of_what_a_graph_was_made(made, last):
    content = (made.bundle.last_logits_graph if last else made.bundle.all_logits_graph).read_bytes()
    for trace in (str(CHECKOUT).encode(), b"torch", b"/home", b"/usr", b"/tmp", b".py", b"site-packages", b"aten"):
        assert trace not in content, trace
    model = made.graph(last=last)
    assert (model.producer_name, model.producer_version, model.doc_string) == ("pastkey", "", "")
    assert not model.functions
    weights = {tensor.name for tensor in model.graph.initializer}
    assert {value.name for value in model.graph.value_info} <= weights  # no intermediate value
    parts = [*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer]
    assert not any(item.doc_string for item in parts)
    assert not any(item.metadata_props for item in [model, model.graph, *parts])


# --- weights ------------------------------------------------------------------------------------------------------
def test_weights_carry_the_modules_names(made):
    known = dict([*made.module.named_parameters(), *made.module.named_buffers()])
    stored = {name: array for name, array in made.weights().items() if array.size > 16}
    stored = {name: array for name, array in stored.items() if not name.startswith(("cos_cache", "sin_cache"))}
    assert stored
    for name, array in stored.items():
        tensor = known[name].detach().numpy()
        assert any(array.shape == form.shape and np.array_equal(array, form) for form in (tensor, tensor.T)), name


def test_no_weight_is_stored_twice(made):
    """Also not transposed, as that of a tied head."""
    seen = [(array.dtype, array.shape, array.tobytes()) for array in made.weights().values()]
    assert len(seen) == len(set(seen))
    matrices = [array for array in made.weights().values() if array.ndim == 2 and min(array.shape) > 1]
    assert not {array.tobytes() for array in matrices} & {array.T.tobytes() for array in matrices}


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
        " { d = Cast <to = 1> (c) e = Add(a, d) f = Reshape(b, c) y = Add(e, f) }",
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

"""Graphs that other programs exported: the parts that are read, refusals, pastkey's form, and their attention."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest

from pastkey.errors import InputError, IntegrityError
from pastkey.export.graph.edit import OPSET
from pastkey.export.source.onnx_folder.attention import UnrecognisedError, fuse_attention, recognise
from pastkey.export.source.onnx_folder.decoder import GivenDecoder
from pastkey.export.source.onnx_folder.given import EXPORT_COMMAND, GivenGraph, read_given, standard_form

from ...small_graphs import Array, run_model
from .given_graphs import CONTEXT, HEADS, KV_HEADS, LAYERS, SIZE, VOCABULARY, Kind, write_graph

KEY, VALUE = "past_key_values.0.key", "past_key_values.0.value"
CACHE = f"float[B, 2, P, 8] {KEY}, float[B, 2, P, 8] {VALUE}"
PRESENT = "float[B, 2, S, 8] present.0.key, float[B, 2, S, 8] present.0.value"
IDS = "int64[B, T] input_ids, int64[B, S] attention_mask"
INPUTS, LOGITS = f"{IDS}, {CACHE}", "float[B, T, 5] logits"
OUTPUTS = f"{LOGITS}, {PRESENT}"
# Keys and values that count the ids.
ADDED = """
    near = Gather (keys, input_ids)
    four = Unsqueeze (near, axis)
    wide = Expand (four, sizes)
    present.0.key = Concat <axis = 2> (past_key_values.0.key, wide)
    present.0.value = Concat <axis = 2> (past_key_values.0.value, wide)
"""
BODY = f"logits = Gather (table, input_ids) {ADDED}"  # logits of only the embedding
_QUOTED = re.compile(r"[A-Za-z_]\w*(?:[.]\w+)+")  # names that onnx's parser accepts in quotes
_OF_TRANSFORMERS = (
    ("past_key_values", "input.cache.layers"), ("present", "output.cache.layers"),
    (".key", ".keys"), (".value", ".values"),
)  # fmt: skip
_KEPT = """
    zero = Constant <value_ints = [0]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    begin = Neg (num_logits_to_keep)
    first = Unsqueeze (begin, zero)
    logits = Slice (all, first, end, axis)
"""


def write(
    path: Path, inputs: str = INPUTS, outputs: str = OUTPUTS, body: str = BODY, opset: int = 18, **weights: Array
) -> Path:
    """Writes a graph of one layer; its logits are rows of a table."""
    inputs, outputs, text = (_QUOTED.sub(r'"\g<0>"', part) for part in (inputs, outputs, body))
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}, "com.microsoft": 1]> g ({inputs}) => ({outputs}) {{{text}}}'
    )
    random = np.random.default_rng(0)
    kind = np.float16 if "float16" in inputs else np.float32
    weights |= {
        "table": random.normal(size=(5, 5)).astype(kind), "keys": random.normal(size=(5, 8)).astype(kind),
        "axis": np.array([1]), "sizes": np.array([1, 2, 1, 8]),
    }  # fmt: skip
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.save(model, path)
    return path


def renamed(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text


# The difference of the graph, words of the sentence, and whether it tells how to export the model again.
REFUSED: dict[str, tuple[dict[str, Any], str, bool]] = {
    "no past": (
        {"inputs": IDS, "outputs": LOGITS, "body": "logits = Gather (table, input_ids)"},
        "has no past keys and values, so that every token would cost the whole text", True,
    ),
    "merged": ({"inputs": f"{INPUTS}, bool[1] use_cache_branch"}, "is a merged decoder", True),
    "no present": (
        {"outputs": f"{LOGITS}, float[B, 2, S, 8] present.0.value"}, f"has {KEY} and no present.0.key", False,
    ),
    "no value": (
        {"inputs": f"{IDS}, float[B, 2, P, 8] {KEY}", "body": BODY.replace(VALUE, KEY)}, f"has {KEY} and no {VALUE}",
        False,
    ),
    "another layer": (
        {"outputs": OUTPUTS.replace("t.0.key", "t.3.key"), "body": BODY.replace("t.0.key", "t.3.key")},
        f"has {KEY} and no present.0.key", False,
    ),
    "no ids": (
        {"inputs": INPUTS.replace("input_ids", "tokens"), "body": BODY.replace("input_ids", "tokens")},
        "has no input_ids", False,
    ),
    "embeddings": ({"inputs": f"{INPUTS}, float[B, T, 8] inputs_embeds"}, "has inputs 'inputs_embeds', and", True),
    "a float mask": (
        {"inputs": INPUTS.replace("int64[B, S]", "float[B, S]")}, "has attention_mask as float ('B', 'S')", False,
    ),
    "one token": ({"inputs": INPUTS.replace("B, T", "B, 1")}, "has input_ids as int64 ('B', '1')", True),
    "symbolic heads": (
        {"inputs": INPUTS.replace("B, 2, P, 8", "B, K, P, D")}, f"has {KEY} as float ('B', 'K', 'P', 'D')", False,
    ),
    "rank": ({"inputs": INPUTS.replace("B, 2, P, 8", "B, P, 8")}, f"has {KEY} as float ('B', 'P', '8')", False),
    "float16": (
        {"inputs": INPUTS.replace("float", "float16"), "outputs": OUTPUTS.replace("float", "float16")},
        f"is in float16 ({KEY})", True,
    ),
    "quantized": (
        {"body": f"{BODY} q, s, z = DynamicQuantizeLinear (keys)"}, "is quantized already (it has DynamicQ", False,
    ),
    "old": ({"opset": 10}, "is of opset 10, and pastkey reads 11 and newer", True),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_graph_that_is_no_decoder_in_float32_is_refused(case, tmp_path):
    options, sentence, again = REFUSED[case]
    with pytest.raises(InputError) as raised:
        read_given(write(tmp_path / "model.onnx", **options))
    assert sentence in str(raised.value)
    assert (EXPORT_COMMAND in str(raised.value)) == again


def test_what_is_no_graph_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"GGUF and so on")
    with pytest.raises((IntegrityError, InputError), match="is not an ONNX graph"):
        read_given(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("location", "size", "sentence"),
    [
        ("../weights.bin", 100, "reads weights from '../weights.bin', outside of its folder"),
        ("weights.bin", None, "cannot open .*weights.bin"),
        ("weights.bin", 50, "cannot open .*table"),
    ],
)
def test_weights_elsewhere_are_refused(location, size, sentence, tmp_path):
    (tmp_path / "folder").mkdir()
    path = write(tmp_path / "folder" / "model.onnx")
    model = onnx.load(path)
    table = next(tensor for tensor in model.graph.initializer if tensor.name == "table")
    table.ClearField("raw_data")
    table.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "100"}.items():
        table.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    if size is not None:
        (path.parent / location).write_bytes(bytes(size))
    with pytest.raises(InputError, match=sentence):
        GivenDecoder(read_given(path), 2, None)


# --- the standard form --------------------------------------------------------------------------------------------
FORMS: dict[str, dict[str, Any]] = {
    "optimum": {},
    "opset 13": {"opset": 13},
    "transformers": {
        "inputs": renamed(f"int64[B, T] input_ids, {CACHE}", *_OF_TRANSFORMERS),
        "outputs": renamed(OUTPUTS, *_OF_TRANSFORMERS),
        "body": renamed(BODY, *_OF_TRANSFORMERS),
    },
    "number of logits": {
        "inputs": f"{INPUTS}, int64 num_logits_to_keep", "body": BODY.replace("logits = ", "all = ") + _KEPT,
    },
    "int32": {
        "inputs": INPUTS.replace("int64", "int32"),
        "body": "i = Constant <value = int32 {1}> () ids = Mul (input_ids, i) " + BODY.replace("input_ids", "ids"),
    },
}  # fmt: skip


def run(path: Path) -> list[Array]:
    """One token behind four."""
    model = ir.load(path)
    past, kind = np.full((1, 2, 4, 8), 0.5, np.float32), model.graph.inputs[0].dtype.numpy()
    feeds = {value.name: past for value in model.graph.inputs} | {"num_logits_to_keep": np.array(0)}
    feeds |= {"input_ids": np.array([[3]], kind), "attention_mask": np.ones((1, 5), kind), "position_ids": [[4]]}
    return run_model(model, **feeds)


@pytest.mark.parametrize("form", FORMS)
def test_each_exporters_form_becomes_the_standard_one(form, tmp_path):
    path = write(tmp_path / "model.onnx", **FORMS[form])
    given = read_given(path)
    assert [(g.kv_heads, g.key_head_size, g.value_head_size) for g in given.layers] == [(2, 8, 8)]
    assert given.weights >= 65
    model = standard_form(given)
    assert model.opset_imports[""] == OPSET
    assert {value.dtype for value in model.graph.inputs[:3]} == {ir.DataType.INT64}
    ids = ["input_ids", "attention_mask", "position_ids"]
    assert [value.name for value in model.graph.inputs] == [*ids, KEY, VALUE]
    assert [value.name for value in model.graph.outputs] == ["logits", "present.0.key", "present.0.value"]
    ir.save(model, tmp_path / "standard.onnx")
    for expected, found in zip(run(path), run(tmp_path / "standard.onnx"), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_newer_opset_stays(tmp_path):
    assert standard_form(read_given(write(tmp_path / "model.onnx", opset=21))).opset_imports[""] == 21


def test_sizes_that_are_known_become_numbers_and_a_gemm_a_matmul(tmp_path):
    body = f"""
        rows = Gather (table, input_ids)
        shape = Shape (rows)
        width = Gather (shape, two)
        last = Unsqueeze (width, zeros)
        flat = Concat <axis = 0> (minus, last)
        joined = Reshape (rows, flat)
        product = Gemm (joined, table, bias)
        batch = Gather (shape, nought)
        tokens = Gather (shape, one)
        batches = Unsqueeze (batch, zeros)
        many = Unsqueeze (tokens, zeros)
        sizes_back = Concat <axis = 0> (batches, many, last)
        apart = Reshape (product, sizes_back)
        logits = Tanh (apart)
        {ADDED}
    """
    weights: Any = {name: np.array(number) for number, name in enumerate(("nought", "one", "two"))}
    weights |= {"zeros": np.array([0]), "minus": np.array([-1]), "bias": np.arange(5, dtype=np.float32)}
    path = write(tmp_path / "model.onnx", body=body, **weights)
    found = standard_form(read_given(path))
    operators = {node.op_type for node in found.graph}
    assert "Gemm" not in operators
    assert {"MatMul", "Add"} <= operators
    ir.save(found, tmp_path / "standard.onnx")
    for expected, made in zip(run(path), run(tmp_path / "standard.onnx"), strict=True):
        np.testing.assert_allclose(made, expected, rtol=1e-6, atol=1e-6)


TOKENS = 40
WINDOW = 12
KINDS = {
    "llama": Kind(),
    "window": Kind(window=WINDOW),
    "gemma2": Kind(window=WINDOW, counts_positions=True, softcap=4.0),
    "gpt2": Kind(learned=True),
    "no mask": Kind(masked=False),
}


def fused(given: GivenGraph) -> ir.Model:
    model = standard_form(given)
    fuse_attention(model, recognise(model, given.layers, CONTEXT), given.layers, HEADS)
    return model


def run_kind(
    path: Path, ids: np.ndarray, past: list[np.ndarray], mask: np.ndarray, positions: np.ndarray | None = None
) -> list[np.ndarray]:
    """Logits and present of ids (B, T) over a past (B, K, P, D); positions count the mask."""
    positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :] if positions is None else positions
    feeds = {f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}": array for i, array in enumerate(past)}
    return run_model(ir.load(path), input_ids=ids, attention_mask=mask, position_ids=positions, **feeds)


@pytest.mark.parametrize("name", KINDS)
def test_fused_attention_computes_the_same(name, tmp_path):
    kind = KINDS[name]
    path, other = write_graph(tmp_path / "model.onnx", kind), tmp_path / "fused.onnx"
    model = fused(read_given(path))
    calls = [node.attributes for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert [call.get_int("local_window_size", 0) for call in calls] == [kind.window or 0] * LAYERS
    assert [call.get_int("num_heads", 0) for call in calls] == [HEADS] * LAYERS
    assert calls[0].get_float("scale", 0.0) == pytest.approx(SIZE**-0.5)
    assert calls[0].get_float("softcap", 0.0) == pytest.approx(kind.softcap or 0.0)
    assert "Softmax" not in {node.op_type for node in model.graph}
    ir.save(model, other)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (1, TOKENS))
    mask, empty = np.ones_like(ids), [np.zeros((1, KV_HEADS, 0, SIZE), np.float32)] * (2 * LAYERS)
    expected = run_kind(path, ids, empty, mask)[0]
    tolerance = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(run_kind(other, ids, empty, mask)[0], expected, atol=tolerance)
    past = run_kind(other, ids[:, :-3], empty, mask[:, :-3])[1:]
    np.testing.assert_allclose(run_kind(other, ids[:, -3:], past, mask)[0], expected[:, -3:], atol=tolerance)


def test_counted_positions_become_those_of_each_row(tmp_path):
    """A shorter row in a batch, padded on the right, gets the positions of its own tokens afterwards."""
    path, other = write_graph(tmp_path / "model.onnx", KINDS["gemma2"]), tmp_path / "fused.onnx"
    ir.save(fused(read_given(path)), other)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 6))
    empty = [np.zeros((2, KV_HEADS, 0, SIZE), np.float32)] * (2 * LAYERS)
    past = run_kind(other, ids, empty, np.array([[1] * 6, [1, 1, 1, 0, 0, 0]]))[1:]
    new = np.array([[7], [8]])
    expected = run_kind(path, new[1:], [array[1:, :, :3] for array in past], np.ones((1, 4), np.int64))[0]
    # GroupQueryAttention counts the tokens of a row by the mask and writes the new one behind them.
    after = np.array([[1] * 7, [1, 1, 1, 1, 0, 0, 0]])
    found = run_kind(other, new, past, after, np.array([[6], [3]]))[0]
    np.testing.assert_allclose(found[1], expected[0], atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("window", "context", "found"),
    [(WINDOW, WINDOW, None), (WINDOW, WINDOW + 1, WINDOW), (1000, 4096, 1000)],
    ids=["as long as the context", "one token shorter", "in a long context"],
)
def test_a_window_is_found_where_it_is_shorter_than_the_context(window, context, found, tmp_path):
    given = read_given(write_graph(tmp_path / "model.onnx", Kind(window=window)))
    assert [call.window for call in recognise(standard_form(given), given.layers, context)] == [found] * LAYERS


def exponentiate_scores(model: ir.Model) -> None:
    for node in [node for node in model.graph if node.op_type == "Softmax"]:
        new = ir.node("Exp", [node.inputs[0]])
        model.graph.insert_before(node, new)
        node.replace_input_with(0, new.outputs[0])


def read_past_elsewhere(model: ir.Model) -> None:
    """Adds the keys of past to the logits."""
    past = next(value for value in model.graph.inputs if value.name == "past_key_values.0.key")
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    total = ir.node("ReduceSum", [past], {"keepdims": 0})
    added = ir.node("Add", [logits, total.outputs[0]])
    added.outputs[0].name, logits.name = "logits", "logits_before"
    added.outputs[0].type, added.outputs[0].shape = logits.type, logits.shape
    model.graph.extend([total, added])
    model.graph.outputs[0] = added.outputs[0]


UNRECOGNISED: dict[str, tuple[Kind, Callable[[ir.Model], None], str]] = {
    "a bias": (Kind(bias=True), lambda model: None, "scores have a bias"),
    "other scores": (Kind(), exponentiate_scores, "scores of layer 0 become weights in"),
    "past read elsewhere": (Kind(), read_past_elsewhere, "ReduceSum reads past outside attention"),
}


@pytest.mark.parametrize("name", UNRECOGNISED)
def test_another_form_stays_as_it_is(name, tmp_path):
    kind, change, reason = UNRECOGNISED[name]
    given = read_given(write_graph(tmp_path / "model.onnx", kind))
    model = standard_form(given)
    change(model)
    common.NameFixPass()(model)
    with pytest.raises(UnrecognisedError, match=reason):
        fuse_attention(model, recognise(model, given.layers, CONTEXT), given.layers, HEADS)

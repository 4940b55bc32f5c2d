"""Graphs that other programs exported: what is read of them, what is refused, and pastkey's form of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from pastkey.errors import InputError, IntegrityError, MissingFileError
from pastkey.export.graph.edit import OPSET
from pastkey.export.source.onnx_folder.given import read_given, standard_form
from pastkey.runtime.providers.ort import onnxruntime

COMMAND = "optimum-cli export onnx --model MODEL --task text-generation-with-past FOLDER"
CACHE = "float[B, 2, P, 8] past_key_values.0.key, float[B, 2, P, 8] past_key_values.0.value"
PRESENT = "float[B, 2, S, 8] present.0.key, float[B, 2, S, 8] present.0.value"
IDS = "int64[B, T] input_ids, int64[B, S] attention_mask"
# Logits of the embedding alone, and keys and values that count the ids.
BODY = """
    logits = Gather (table, {ids})
    near = Gather (keys, {ids})
    four = Unsqueeze (near, axis)
    wide = Expand (four, sizes)
    present.0.key = Concat <axis = 2> ({key}, wide)
    present.0.value = Concat <axis = 2> ({value}, wide)
"""
_QUOTED = re.compile(r"[A-Za-z_]\w*(?:[.]\w+)+")  # names that onnx's parser takes in quotes
_OF_TRANSFORMERS = (
    ("past_key_values", "input.cache.layers"),
    ("present", "output.cache.layers"),
    (".key", ".keys"),
    (".value", ".values"),
)
_KEPT = """
    zero = Constant <value_ints = [0]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    begin = Neg (num_logits_to_keep)
    first = Unsqueeze (begin, zero)
    logits = Slice (all, first, end, axis)
"""


def write(
    path: Path,
    inputs: str = f"{IDS}, {CACHE}",
    outputs: str = f"float[B, T, 5] logits, {PRESENT}",
    *,
    body: str = BODY,
    opset: int = 18,
    ids: str = "input_ids",
    names: tuple[str, str] = ("past_key_values.0.key", "past_key_values.0.value"),
    halves: bool = False,
) -> Path:
    """Writes a graph of one layer; its logits are rows of a table."""
    inputs, outputs, text = (
        _QUOTED.sub(r'"\g<0>"', part) for part in (inputs, outputs, body.format(ids=ids, key=names[0], value=names[1]))
    )
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}, "com.microsoft": 1]> g ({inputs}) => ({outputs}) {{{text}}}'
    )
    random = np.random.default_rng(0)
    kind = np.float16 if halves else np.float32
    weights = {
        "table": random.normal(size=(5, 5)).astype(kind),
        "keys": random.normal(size=(5, 8)).astype(kind),
        "axis": np.array([1]),
        "sizes": np.array([1, 2, 1, 8]),
    }
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.save(model, path)
    return path


def renamed(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no past": (
        {"inputs": IDS, "outputs": "float[B, T, 5] logits", "body": "logits = Gather (table, input_ids)"},
        "takes no past keys and values, so that every token would cost the whole text: export the model with them",
    ),
    "merged": ({"inputs": f"{IDS}, {CACHE}, bool[1] use_cache_branch"}, "is a merged decoder, two graphs in one"),
    "no present": (
        {"outputs": "float[B, T, 5] logits, float[B, 2, S, 8] present.0.value"},
        "has past_key_values.0.key and no present.0.key: every layer needs keys and values",
    ),
    "no value": (
        {"inputs": f"{IDS}, float[B, 2, P, 8] past_key_values.0.key", "names": ("past_key_values.0.key",) * 2},
        "has past_key_values.0.key and no past_key_values.0.value",
    ),
    "another layer": (
        {
            "outputs": f"float[B, T, 5] logits, {PRESENT.replace('t.0.key', 't.3.key')}",
            "body": BODY.replace("t.0.key", "t.3.key"),
        },
        "has past_key_values.0.key and no present.0.key",
    ),
    "no ids": (
        {"inputs": f"int64[B, T] tokens, int64[B, S] attention_mask, {CACHE}", "ids": "tokens"},
        "has no input_ids",
    ),
    "embeddings": (
        {"inputs": f"{IDS}, {CACHE}, float[B, T, 8] inputs_embeds"},
        "takes 'inputs_embeds', and a decoder's graph takes input_ids, attention_mask, position_ids and past keys",
    ),
    "a float mask": (
        {"inputs": f"int64[B, T] input_ids, float[B, S] attention_mask, {CACHE}"},
        "takes attention_mask as float ('B', 'S'): expected whole numbers (batch, tokens)",
    ),
    "one token": (
        {"inputs": f"int64[B, 1] input_ids, {CACHE}"},
        "takes input_ids as int64 ('B', '1'), of a fixed size: export the model with dynamic axes",
    ),
    "symbolic heads": (
        {"inputs": renamed(f"{IDS}, {CACHE}", ("B, 2, P, 8", "B, K, P, D"))},
        "takes past_key_values.0.key as float ('B', 'K', 'P', 'D'): expected float (batch, heads, tokens, head size)",
    ),
    "rank": (
        {"inputs": renamed(f"{IDS}, {CACHE}", ("B, 2, P, 8", "B, P, 8"))},
        "has past_key_values.0.key as float ('B', 'P', '8'): expected (batch, heads, tokens, head size)",
    ),
    "float16": (
        {
            "halves": True,
            "inputs": f"{IDS}, {CACHE.replace('float', 'float16')}",
            "outputs": f"float16[B, T, 5] logits, {PRESENT.replace('float', 'float16')}",
        },
        "is in float16 (past_key_values.0.key): give the float32 graph",
    ),
    "quantized": (
        {"body": f"{BODY} q, s, z = DynamicQuantizeLinear (keys)"},
        "is quantized already (it has DynamicQuantizeLinear): give the float32 graph, model.onnx",
    ),
    "old": ({"opset": 10}, "is of opset 10, and pastkey takes 11 and newer: export the model again"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_graph_that_is_no_decoder_in_float32_is_refused(case, tmp_path):
    options, sentence = REFUSED[case]
    with pytest.raises(InputError) as raised:
        read_given(write(tmp_path / "model.onnx", **options))
    assert sentence in str(raised.value)
    if "export the model" in sentence:
        assert COMMAND in str(raised.value)


def test_what_is_no_graph_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"GGUF and so on")
    with pytest.raises((IntegrityError, InputError), match="is not an ONNX graph"):
        read_given(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("location", "size", "kind", "sentence"),
    [
        ("../weights.bin", 100, InputError, "takes weights from '../weights.bin', outside of its folder"),
        ("weights.bin", None, MissingFileError, "takes weights from weights.bin, which is not beside it"),
        ("weights.bin", 50, InputError, "takes the bytes 0 to 100 of weights.bin, which has 50: it was cut short"),
    ],
)
def test_weights_elsewhere_are_refused(location, size, kind, sentence, tmp_path):
    path = write(tmp_path / "folder.onnx")
    model = onnx.load(path)
    table = next(tensor for tensor in model.graph.initializer if tensor.name == "table")
    table.ClearField("raw_data")
    table.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "100"}.items():
        table.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    if size is not None:
        (tmp_path / location).resolve().write_bytes(bytes(size))
    with pytest.raises(kind, match=sentence.replace(".", "[.]")):
        read_given(path)
    if location.startswith(".."):
        (tmp_path / location).resolve().unlink()


# --- the standard form --------------------------------------------------------------------------------------------
FORMS: dict[str, dict[str, Any]] = {
    "optimum": {},
    "opset 13": {"opset": 13},
    "transformers": {
        "inputs": renamed(f"int64[B, T] input_ids, {CACHE}", *_OF_TRANSFORMERS),
        "outputs": renamed(f"float[B, T, 5] logits, {PRESENT}", *_OF_TRANSFORMERS),
        "body": renamed(BODY, *_OF_TRANSFORMERS[1:]),
        "names": ("input.cache.layers.0.keys", "input.cache.layers.0.values"),
    },
    "number of logits": {
        "inputs": f"{IDS}, {CACHE}, int64 num_logits_to_keep",
        "body": renamed(BODY, ("logits = ", "all = ")) + _KEPT,
    },
    "int32": {"inputs": f"int32[B, T] input_ids, int32[B, S] attention_mask, {CACHE}"},
}  # fmt: skip


def run(model: Path, ids: list[int], past: int) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    kinds = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
    feeds = {}
    for value in session.get_inputs():
        if "input_ids" in value.name or "position" in value.name:
            feeds[value.name] = np.array([ids], kinds[value.type])
        elif value.name == "attention_mask":
            feeds[value.name] = np.ones((1, past + len(ids)), kinds[value.type])
        elif "logits" in value.name:
            feeds[value.name] = np.zeros((), np.int64)
        else:
            feeds[value.name] = np.full((1, 2, past, 8), 0.5, np.float32)
    return list(session.run(None, feeds))


@pytest.mark.parametrize("form", FORMS)
def test_each_exporters_form_becomes_the_standard_one(form, tmp_path):
    path = write(tmp_path / "model.onnx", **FORMS[form])
    given = read_given(path)
    assert [(g.kv_heads, g.key_head_size, g.value_head_size) for g in given.layers] == [(2, 8, 8)]
    assert given.weights >= 65
    model = standard_form(given)
    assert model.opset_imports[""] == OPSET
    assert {value.dtype for value in model.graph.inputs[:3]} == {ir.DataType.INT64}
    assert [value.name for value in model.graph.inputs] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert [value.name for value in model.graph.outputs] == ["logits", "present.0.key", "present.0.value"]
    ir.save(model, tmp_path / "standard.onnx")
    for expected, found in zip(run(path, [3], 4), run(tmp_path / "standard.onnx", [3], 4), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_newer_opset_stays(tmp_path):
    assert standard_form(read_given(write(tmp_path / "model.onnx", opset=21))).opset_imports[""] == 21


def test_sizes_that_are_known_become_numbers_and_a_gemm_a_matmul(tmp_path):
    body = """
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
        near = Gather (keys, input_ids)
        four = Unsqueeze (near, axis)
        wide = Expand (four, sizes)
        present.0.key = Concat <axis = 2> (past_key_values.0.key, wide)
        present.0.value = Concat <axis = 2> (past_key_values.0.value, wide)
    """
    path = write(tmp_path / "model.onnx", body=body)
    model = onnx.load(path)
    extra = {"nought": np.array(0), "one": np.array(1), "two": np.array(2), "zeros": np.array([0])}
    extra["minus"] = np.array([-1])
    extra["bias"] = np.arange(5, dtype=np.float32)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in extra.items())
    onnx.save(model, path)
    found = standard_form(read_given(path))
    operators = [node.op_type for node in found.graph]
    assert "Gemm" not in operators
    assert {"MatMul", "Add"} <= set(operators)
    ir.save(found, tmp_path / "standard.onnx")
    for a, b in zip(run(path, [3], 4), run(tmp_path / "standard.onnx", [3], 4), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)

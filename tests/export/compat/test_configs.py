"""The folder's files: weights once, at aligned places, and configurations that other programs read."""

from __future__ import annotations

import json

import onnx_ir as ir
import pytest
from tokenizers import Tokenizer, models, processors
from torch import nn

from pastkey.contract import names
from pastkey.contract.bundle import CacheShift, KVGeometry, Manifest
from pastkey.export import export
from pastkey.export.compat.configs import write_configurations
from pastkey.export.source.source import Source

from ..cases import CASES

MANIFEST = Manifest("0", "m", "fp32", "cpu", "fused", "", 8, 8, (KVGeometry(1, 8, 8),), 20, 10, "1.26.0", CacheShift())


def read(made, name):
    return json.loads((made.bundle.path / name).read_text(encoding="utf-8"))


# --- weights ------------------------------------------------------------------------------------------------------
def test_an_int8_embedding_and_its_tied_head_share_their_bytes(exported):
    stored = ir.load(exported("llama", "int8").bundle.all_logits_graph).graph.initializers
    table, blocks = (stored[f"model.embed_tokens.weight.{name}"].const_value for name in ("table", "blocks"))
    assert (table.offset, table.length) == (blocks.offset, blocks.length)
    assert table.length == 61 * 48  # one byte a weight; 48 is a multiple of 16


def test_a_model_without_large_weights_has_no_weights_file(exported):
    made = exported("three_axes")
    onnx_files = {path.name for path in (made.bundle.path / "onnx").iterdir()}
    assert onnx_files == {"model.onnx", "pastkey.onnx"}
    assert read(made, names.CONFIG)["transformers.js_config"] == {"dtype": "fp32"}


# --- configurations -----------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_config_json_of_a_module_holds_the_observed_sizes(exported):
    config = read(exported("multi_query_repeated_by_hand"), names.CONFIG)
    expected = {
        "model_type": "llama", "architectures": ["RepeatedKv"], "vocab_size": 37, "max_position_embeddings": 11,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "hidden_size": 32,
    }  # fmt: skip
    assert config | expected == config


def test_config_json_declares_the_weights_file_to_transformers_js(exported):
    fp32, int8 = read(exported("llama"), names.CONFIG), read(exported("llama", "int8"), names.CONFIG)
    int4 = read(exported("llama", "int4"), names.CONFIG)
    assert fp32["transformers.js_config"] == {"dtype": "fp32", "use_external_data_format": {"model.onnx": 1}}
    assert int8["transformers.js_config"] == {"dtype": "q8", "use_external_data_format": {"model_quantized.onnx": 1}}
    assert int4["transformers.js_config"]["dtype"] == "q4"


def test_genai_config_names_the_graphs_own_tensors(exported):
    for made, shared, file in (
        (exported("llama"), True, "model.onnx"),
        (exported("llama", "int4"), True, "model_q4.onnx"),
        (exported("head_size_10_context_11"), False, "model.onnx"),
    ):
        content = read(made, names.GENAI_CONFIG)
        decoder = content["model"]["decoder"]
        assert decoder["filename"] == f"onnx/{file}"
        graph = made.graph().graph
        tensors = {value.name for value in [*graph.input, *graph.output]}
        for pattern in [*decoder["inputs"].values(), *decoder["outputs"].values()]:
            assert (pattern % 0 if "%d" in pattern else pattern) in tensors
        assert decoder["num_hidden_layers"] == len(made.bundle.manifest.layers)
        assert content["model"]["context_length"] == content["search"]["max_length"]
        assert content["search"]["past_present_share_buffer"] is shared


def test_infinity_and_nan_are_written_as_transformers_writes_them(tmp_path):
    limits = {"limits": (0.0, float("inf")), "inner": {"low": float("-inf"), "none": float("nan")}}
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8, "vocab_size": 8}
    source = Source(nn.Identity(), "source", 8, config={"model_type": "llama", **sizes, **limits})
    (tmp_path / "onnx").mkdir()
    write_configurations(tmp_path, source, MANIFEST, [1])
    content = json.loads((tmp_path / names.CONFIG).read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["limits"] == [0.0, {"__float__": "Infinity"}]
    assert content["inner"] == {"low": {"__float__": "-Infinity"}, "none": {"__float__": "NaN"}}


def test_generation_config_ends_at_the_context(exported):
    content = read(exported("llama"), names.GENERATION_CONFIG)
    assert content["max_length"] == 40
    assert content["eos_token_id"] is None


@pytest.mark.parametrize("adds", [pytest.param(True, marks=pytest.mark.slow), False])
def test_tokenizer_config_says_what_other_programs_would_guess(adds, tmp_path):
    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, "a": 1, "b": 2}, merges=[]))
    if adds:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / names.TOKENIZER))
    (tmp_path / names.TOKENIZER_CONFIG).write_text(json.dumps({"bos_token": "<s>", "model_max_length": 8}))
    case = CASES["three_axes"]
    report = export(case.build(), tmp_path / "bundle", "fp32", tokenizer=tmp_path, context_length=case.context)
    assert json.loads((report.path / names.TOKENIZER_CONFIG).read_text(encoding="utf-8")) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "model_max_length": 8,
        "model_input_names": ["input_ids", "attention_mask"],
        "add_bos_token": adds,
    }


PAIRS = {("a", "b"): "a b", ("a", " b"): ["a", " b"], ("#version", "b"): ["#version", "b"]}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_of_merges_is_one_text_where_it_can_be(pair, tmp_path):
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate([*pair, "".join(pair)])}, [pair]))
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8, "vocab_size": 8}
    config, content = {"model_type": "llama", **sizes}, tokenizer.to_str().encode()
    (tmp_path / "onnx").mkdir()
    write_configurations(tmp_path, Source(nn.Identity(), "m", 8, config=config, tokenizer=content), MANIFEST, [1])
    written = (tmp_path / names.TOKENIZER).read_bytes()
    assert json.loads(written)["model"]["merges"] == [PAIRS[pair]]
    assert Tokenizer.from_buffer(written).to_str() == tokenizer.to_str()

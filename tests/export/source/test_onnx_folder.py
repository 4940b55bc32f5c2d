"""ONNX folders that other programs exported, as sources of an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from tokenizers import Tokenizer

import pastkey
from pastkey.contract.bundle import open_bundle
from pastkey.errors import ContractError, InputError, MissingFileError
from pastkey.export import export
from pastkey.export.graft.given_graph import GivenDecoder
from pastkey.export.measure.reference import open_exported
from pastkey.export.source.onnx_folder import find_graph
from pastkey.export.source.open import open_source

from ..given import CONTEXT, KV_HEADS, SIZE, VOCABULARY, Kind, write_folder

PROMPT = [5, 17, 44, 3]
NEW = 24


@pytest.fixture(scope="module")
def folder(made_once, word_tokenizer):
    """A folder as optimum writes it, of a Llama kind."""
    return made_once("onnx-folder", lambda made: write_folder(made, tokenizer=word_tokenizer, sliding_window=None))


def greedy(graph: Path, count: int) -> list[int]:
    """The file's own greedy continuation of PROMPT, uncached."""
    decoder = open_source(graph).module
    assert isinstance(decoder, GivenDecoder)
    ids = list(PROMPT)
    for _ in range(count):
        ids.append(int(decoder.run(np.array([ids]))[0][0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_folder_of_optimum_becomes_a_bundle(precision, folder, tmp_path):
    report = export(folder, tmp_path / "bundle", precision)
    manifest = report.manifest
    assert (manifest.graph, manifest.padding, manifest.opset) == ("fused", True, 20)
    assert manifest.shift is not None
    assert len(manifest.shift.rotations) == 1
    assert all(report.manifest.parity[name]["ok"] for name in {"fp32", precision})
    assert manifest.parity["fp32"]["reference"] == "source"
    assert manifest.eos_token_ids == (VOCABULARY - 1,)
    lm = pastkey.load(tmp_path / "bundle")
    found = lm.generate(PROMPT, max_new_tokens=NEW, stop_token_ids=[], eos_token_id=[])
    if precision == "fp32":
        assert found.ids == greedy(folder / "model.onnx", NEW)
    else:
        assert report.manifest.quality["kl_divergence"] < 0.05
        assert report.weight_bytes < 0.4 * report.fp32_weight_bytes
    config = json.loads((tmp_path / "bundle" / "config.json").read_text())
    assert (config["model_type"], config["num_key_value_heads"]) == ("llama", KV_HEADS)
    assert "transformers_version" not in config
    tokenizer = json.loads((tmp_path / "bundle" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert lm.prompt_ids("w5 w17 w44 w3") == PROMPT


def test_verify_compares_a_bundle_with_the_folder(folder, tmp_path):
    export(folder, tmp_path / "bundle", "fp32", graph="standard")
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest.graph == "standard"
    module, layers = open_exported(str(folder), bundle)
    assert isinstance(module, GivenDecoder)
    assert len(layers) == len(bundle.manifest.layers)


def test_a_table_of_positions_shorter_than_the_context(tmp_path):
    longer = write_folder(tmp_path / "given", Kind(learned=True), max_position_embeddings=4 * CONTEXT)
    with pytest.raises(InputError, match=rf"positions for {CONTEXT} tokens, .* with --context {CONTEXT}$"):
        export(longer, tmp_path / "bundle", "fp32")
    assert export(longer, tmp_path / "bundle", "fp32", context_length=CONTEXT).verification.ok


def test_what_is_opened(folder, tmp_path):
    source = open_source(folder)
    assert (source.name, source.context_length) == (folder.name, CONTEXT)
    assert source.bos_token_id is None
    assert source.eos_token_ids == (VOCABULARY - 1,)
    assert open_source(folder, context_length=32).context_length == 32
    copy = tmp_path / "hub"
    shutil.copytree(folder, copy)
    (copy / "onnx").mkdir()
    (copy / "model.onnx").rename(copy / "onnx" / "model.onnx")
    (copy / "onnx" / "model_q4.onnx").write_bytes(b"")
    (copy / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.5, "eos_token_id": [3, 4]})
    )
    source = open_source(copy)
    assert isinstance(source.module, GivenDecoder)
    assert source.module.given.path == copy / "onnx" / "model.onnx"
    assert source.generation == {"do_sample": True, "temperature": 0.5}
    assert source.eos_token_ids == (3, 4)
    assert open_source(copy / "onnx" / "model.onnx").name == "hub"
    (copy / "model.safetensors").write_bytes(b"")
    assert find_graph(copy) is None  # safetensors are the model itself, and preferred


def test_folders_without_a_decoder_in_float32_are_refused(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name, sentence in (
        ("encoder_model.onnx", "holds an encoder-decoder or another model of several parts"),
        (
            "decoder_model_merged.onnx",
            "holds a decoder in several graphs .decoder_model_merged.onnx.: export the model",
        ),
        ("model_fp16.onnx", "has model_fp16.onnx and no model.onnx, which is the float32 graph"),
    ):
        next(copy.glob("*.onnx")).rename(copy / name)
        with pytest.raises(InputError, match=sentence):
            open_source(copy)
    (copy / "model_fp16.onnx").rename(copy / "model.onnx")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": True}))
    with pytest.raises(InputError, match="holds an encoder-decoder: only decoders"):
        open_source(copy)
    del config["max_position_embeddings"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="names no context length: give it with --context N"):
        open_source(copy)
    assert open_source(copy, context_length=64).context_length == 64
    (copy / "config.json").unlink()
    with pytest.raises(MissingFileError, match=r"has no config\.json beside it"):
        open_source(copy)


def test_another_models_tokenizer_is_refused(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.add_tokens(["<more>"])
    tokenizer.save(str(copy / "tokenizer.json"))
    with pytest.raises(
        InputError, match=f"makes token ids up to {VOCABULARY}, but the model has {VOCABULARY} embeddings"
    ):
        export(copy, tmp_path / "bundle", "fp32")
    assert not (tmp_path / "bundle").exists()


def test_last_hidden_states_of_a_graph_are_refused(folder, tmp_path):
    with pytest.raises(ContractError, match="is an ONNX graph, whose last hidden states cannot be compared"):
        export(folder, tmp_path / "bundle", "fp32", hidden_states=True)


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "model.onnx").rename(tmp_path / "elsewhere.onnx")
    (copy / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(InputError, match="leads out of"):
        open_source(copy)
    (copy / "model.onnx").unlink()
    (copy / "onnx").mkdir()
    model = onnx.load(tmp_path / "elsewhere.onnx")
    onnx.save(model, copy / "onnx" / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert open_source(copy).name == "copy"
    (copy / "onnx" / "weights.bin").rename(tmp_path / "weights.bin")
    (copy / "onnx" / "weights.bin").symlink_to(tmp_path / "weights.bin")
    with pytest.raises(InputError, match=r"weights\.bin leads out of"):
        open_source(copy)


def test_attention_of_another_form_leaves_the_standard_graph(tmp_path):
    report = export(write_folder(tmp_path / "folder", Kind(bias=True)), tmp_path / "bundle", "fp32")
    assert report.manifest.graph == "standard"
    assert "GroupQueryAttention cannot take the attention of model.onnx: scores have a bias" in (
        report.manifest.graph_reason
    )
    assert report.manifest.layers[0].key_head_size == SIZE

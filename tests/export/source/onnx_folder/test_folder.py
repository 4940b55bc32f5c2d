"""ONNX folders that other programs exported, as sources of an export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tokenizers import Tokenizer

import pastkey
from pastkey.contract.bundle import open_bundle
from pastkey.errors import ContractError, InputError, MissingFileError, PastkeyError
from pastkey.export import export
from pastkey.export.measure.reference import open_exported
from pastkey.export.source.onnx_folder.decoder import GivenDecoder
from pastkey.export.source.onnx_folder.folder import find_graph
from pastkey.export.source.open import open_source
from pastkey.export.source.source import Opening

from .given_graphs import CONTEXT, KV_HEADS, VOCABULARY, Kind, write_folder

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


def test_a_folder_of_optimum_becomes_a_bundle(folder, tmp_path):
    manifest = export(folder, tmp_path / "bundle", "fp32").manifest
    assert (manifest.graph, manifest.padding, manifest.opset) == ("fused", True, 20)
    assert len(manifest.shift.rotations) == 1
    assert (manifest.parity["fp32"]["ok"], manifest.parity["fp32"]["reference"]) == (True, "source")
    lm = pastkey.load(tmp_path / "bundle")
    found = lm.generate(PROMPT, max_new_tokens=NEW, stop_token_ids=[], eos_token_id=[])
    assert found.ids == greedy(folder / "model.onnx", NEW)
    config = json.loads((tmp_path / "bundle" / "config.json").read_text())
    assert (config["model_type"], config["num_key_value_heads"]) == ("llama", KV_HEADS)
    assert "transformers_version" not in config
    tokenizer = json.loads((tmp_path / "bundle" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert lm.prompt_ids("w5 w17 w44 w3") == PROMPT
    bundle = open_bundle(tmp_path / "bundle")
    module, layers = open_exported(str(folder), bundle)
    assert isinstance(module, GivenDecoder)
    assert len(layers) == len(bundle.manifest.layers)


def test_a_table_of_positions_shorter_than_the_context(tmp_path):
    longer = write_folder(tmp_path / "given", Kind(learned=True), max_position_embeddings=4 * CONTEXT)
    with pytest.raises(InputError, match=rf"positions for {CONTEXT} tokens, .* with --context {CONTEXT}$"):
        export(longer, tmp_path / "bundle", "fp32")


def test_what_is_opened(folder, tmp_path):
    source = open_source(folder)
    assert (source.name, source.context_length) == (folder.name, CONTEXT)
    assert source.bos_token_id is None
    assert source.eos_token_ids == (VOCABULARY - 1,)
    assert open_source(folder, Opening(context_length=32)).context_length == 32
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


def renamed(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.onnx").rename(folder / name)


def configured(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )


def linked_out(file: Path, folder: Path) -> None:
    file.rename(folder.parent / "elsewhere")
    file.symlink_to(folder.parent / "elsewhere")


def linked_weights(folder: Path) -> None:
    (folder / "onnx").mkdir()
    model = onnx.load(folder / "model.onnx")
    (folder / "model.onnx").unlink()
    target = folder / "onnx" / "model.onnx"
    onnx.save(model, target, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert open_source(folder).name == folder.name
    linked_out(folder / "onnx" / "weights.bin", folder)


REFUSED: dict[str, tuple[Callable[[Path], object], type[PastkeyError], str]] = {
    "an encoder": (renamed("encoder_model.onnx"), InputError, "an encoder-decoder or another model of several parts"),
    "several graphs": (renamed("decoder_model_merged.onnx"), InputError, r"several graphs \(decoder_model_merged"),
    "no float32": (renamed("model_fp16.onnx"), InputError, "has model_fp16.onnx and no model.onnx"),
    "an encoder-decoder": (lambda f: configured(f, is_encoder_decoder=True), InputError, "holds an encoder-decoder: "),
    "no context": (lambda f: configured(f, max_position_embeddings=None), InputError, "give it with --context N"),
    "no configuration": (lambda f: (f / "config.json").unlink(), MissingFileError, r"has no config\.json beside it"),
    "a link": (lambda f: linked_out(f / "model.onnx", f), InputError, r"model\.onnx leads out of"),
    "a link of weights": (linked_weights, InputError, r"weights\.bin leads out of"),
}


@pytest.mark.parametrize("spoilt", REFUSED)
def test_a_spoilt_folder_is_refused(spoilt, folder, tmp_path):
    spoil, error, word = REFUSED[spoilt]
    spoil(copy := shutil.copytree(folder, tmp_path / "copy"))
    with pytest.raises(error, match=word):
        open_source(copy)
    if spoilt == "no context":
        assert open_source(copy, Opening(context_length=64)).context_length == 64


def test_another_models_tokenizer_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.add_tokens(["<more>"])
    tokenizer.save(str(copy / "tokenizer.json"))
    with pytest.raises(InputError, match=f"token ids up to {VOCABULARY}, but the model has {VOCABULARY} embeddings"):
        export(copy, tmp_path / "bundle", "fp32")


def test_last_hidden_states_of_a_graph_are_refused(folder, tmp_path):
    with pytest.raises(ContractError, match="is an ONNX graph, whose last hidden states cannot be compared"):
        export(folder, tmp_path / "bundle", "fp32", hidden_states=True)

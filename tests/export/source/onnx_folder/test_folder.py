"""ONNX folders that other programs exported, as sources of an export, and the module that their graph becomes."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.helper import make_node, make_tensor_value_info
from tokenizers import Tokenizer

import pastkey
from pastkey.contract.bundle import open_bundle
from pastkey.errors import ContractError, InputError, MissingFileError
from pastkey.export import export
from pastkey.export.graft.probe.contract import in_contract
from pastkey.export.graft.probe.positions import find_shift
from pastkey.export.measure.reference import open_exported
from pastkey.export.source.onnx_folder.decoder import GivenDecoder
from pastkey.export.source.onnx_folder.folder import find_graph
from pastkey.export.source.onnx_folder.given import read_given
from pastkey.export.source.open import open_source
from pastkey.export.source.source import Opening
from pastkey.runtime.providers.ort import onnxruntime

from ..opening import Refused, change, link_out, write
from .given_graphs import CONTEXT, HEADS, KV_HEADS, LAYERS, VOCABULARY, Decoder, Kind, write_folder, write_graph

PROMPT = [5, 17, 44, 3]
NEW = 24


@pytest.fixture(scope="module")
def folder(made_once, word_tokenizer):
    """A folder as optimum writes it, of a Llama kind."""
    return made_once("onnx-folder", lambda made: write_folder(made, tokenizer=word_tokenizer, sliding_window=None))


def test_a_folder_of_optimum_becomes_a_bundle(folder, tmp_path):
    manifest = export(folder, tmp_path / "bundle", "fp32").manifest
    assert (manifest.graph, manifest.padding, manifest.opset) == ("fused", True, 20)
    assert len(manifest.shift.rotations) == 1
    assert (manifest.parity["fp32"]["ok"], manifest.parity["fp32"]["reference"]) == (True, "source")
    lm = pastkey.load(tmp_path / "bundle")
    decoder, ids = open_source(folder / "model.onnx").module, list(PROMPT)
    assert isinstance(decoder, GivenDecoder)
    for _ in range(NEW):  # the file's own greedy continuation, uncached
        ids.append(int(decoder.run(np.array([ids]))[0][0, -1].argmax()))
    found = lm.generate(PROMPT, max_new_tokens=NEW, stop_token_ids=[], eos_token_id=[])
    assert PROMPT + found.ids == ids
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
    assert (source.bos_token_id, source.eos_token_ids) == (None, (VOCABULARY - 1,))
    assert open_source(folder, Opening(context_length=32)).context_length == 32
    copy = shutil.copytree(folder, tmp_path / "hub")
    (copy / "onnx").mkdir()
    (copy / "model.onnx").rename(copy / "onnx" / "model.onnx")
    (copy / "onnx" / "model_q4.onnx").touch()
    stated = {"do_sample": True, "temperature": 0.5}
    write(copy / "generation_config.json", stated | {"eos_token_id": [3, 4]})
    source = open_source(copy)
    assert isinstance(source.module, GivenDecoder)
    assert source.module.given.path == copy / "onnx" / "model.onnx"
    assert (source.generation, source.eos_token_ids) == (stated, (3, 4))
    assert open_source(copy / "onnx" / "model.onnx").name == "hub"
    (copy / "model.safetensors").touch()
    assert find_graph(copy) is None  # safetensors are the model itself, and preferred


def rename(folder: Path, name: str) -> None:
    (folder / "model.onnx").rename(folder / name)


def link_weights(folder: Path) -> None:
    model, moved = onnx.load(folder / "model.onnx"), folder / "onnx" / "model.onnx"
    (folder / "model.onnx").unlink()
    moved.parent.mkdir()
    onnx.save(model, moved, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert open_source(folder).name == folder.name
    link_out(folder, "onnx/weights.bin")


def configure(folder: Path, **entries: object) -> None:
    change(folder / "config.json", **entries)


def lengthen_the_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<more>"])
    tokenizer.save(str(folder / "tokenizer.json"))


REFUSED: dict[str, Refused] = {
    "no float32": (partial(rename, name="model_fp16.onnx"), MissingFileError, r"no weights: expected model\.saf"),
    "an encoder-decoder": (partial(configure, is_encoder_decoder=True), InputError, "holds an encoder-decoder: "),
    "no context": (partial(configure, max_position_embeddings=None), InputError, "give it with --context N"),
    "no configuration": (lambda f: (f / "config.json").unlink(), MissingFileError, r"has no config\.json next to it"),
    "a link": (partial(link_out, name="model.onnx"), InputError, r"model\.onnx leads out of"),
    "a link of weights": (link_weights, InputError, r"weights\.bin leads out of"),
    "another model's tokenizer": (lengthen_the_tokenizer, InputError, f"token ids up to {VOCABULARY}, but the model"),
}


@pytest.mark.parametrize("spoilt", REFUSED)
def test_a_spoilt_folder_is_refused(spoilt, folder, tmp_path):
    spoil, error, word = REFUSED[spoilt]
    spoil(copy := shutil.copytree(folder, tmp_path / "copy"))
    with pytest.raises(error, match=word):
        export(copy, tmp_path / "bundle", "fp32")
    if spoilt == "no context":
        assert open_source(copy, Opening(context_length=64)).context_length == 64


def test_last_hidden_states_of_a_graph_are_refused(folder, tmp_path):
    with pytest.raises(ContractError, match="is an ONNX graph, whose last hidden states cannot be compared"):
        export(folder, tmp_path / "bundle", "fp32", hidden_states=True)


WINDOW, PLAIN = 12, Kind()


def opened(folder: Path, window: int | None = None) -> GivenDecoder:
    return GivenDecoder(read_given(folder / "model.onnx"), HEADS, window)


def decoder_of(folder: Path, kind: Kind = PLAIN, window: int | None = None) -> GivenDecoder:
    write_graph(folder / "model.onnx", kind)
    return opened(folder, window)


def test_it_computes_what_the_file_computes(tmp_path):
    decoder = decoder_of(tmp_path)
    ids, past = torch.arange(14).reshape(2, 7), [torch.zeros(2, 2, 0, 16)] * (2 * LAYERS)
    with torch.no_grad():
        expected = Decoder(PLAIN).eval()(ids, torch.ones_like(ids), torch.arange(7).expand(2, 7), *past)
    run = decoder.uncached(ids)
    torch.testing.assert_close(run.logits, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run.keys[1], expected[3], rtol=1e-4, atol=1e-5)
    assert decoder.rounding(ids[0].numpy()) < 1e-5
    with pytest.raises(InputError, match="is for a module in Python"):
        in_contract(decoder, CONTEXT, "model(ids)", print)


@pytest.mark.parametrize(
    ("kind", "window", "padding"),
    [
        (PLAIN, None, True),
        (Kind(window=WINDOW), WINDOW, False),  # counts columns
        (Kind(counts_positions=True), None, False),
        (Kind(masked=False), None, False),
        (PLAIN, 4000, False),  # a window that is too long to try
    ],
)
def test_a_run_shows_whether_past_may_have_holes(kind, window, padding, tmp_path):
    context = 8000 if window == 4000 else CONTEXT
    assert decoder_of(tmp_path, kind)._takes_holes(context, VOCABULARY, window) is padding


def test_what_is_observed_and_the_two_graphs(tmp_path):
    decoder = decoder_of(tmp_path, Kind(window=WINDOW), WINDOW)
    found = in_contract(decoder, CONTEXT, None, print)
    observation = found.observation
    assert found.module is decoder
    assert (observation.vocab_size, observation.layers[0].window, observation.padding) == (VOCABULARY, WINDOW, False)
    assert [layer.heads for layer in observation.layers] == [HEADS] * LAYERS
    fused, seen = decoder.graph("fused", observation)
    assert seen.padding
    assert "GroupQueryAttention" in {node.op_type for node in fused.graph}
    assert "blocks.0.down.weight" in fused.graph.initializers
    standard, seen = decoder.graph("standard", observation)
    assert not seen.padding
    assert "GroupQueryAttention" not in {node.op_type for node in standard.graph}


@pytest.mark.parametrize("counts", [False, True])
def test_rotary_keys_can_be_shifted_and_counted_positions_cannot(counts, tmp_path):
    decoder = decoder_of(tmp_path, Kind(counts_positions=counts))
    _, observation = decoder.graph("fused", decoder.observed(CONTEXT))
    shift = find_shift(decoder, observation, CONTEXT)
    assert shift.refused == ("it computes the positions of tokens itself" if counts else "")
    assert bool(shift.rotations) is not counts


def test_an_unread_input_of_positions_is_no_position(tmp_path):
    """Otherwise keys that the graph turns by its own count would pass as keys without positions."""
    model = onnx.load(write_graph(tmp_path / "model.onnx", Kind(counts_positions=True)))
    axes = ["batch_size", "sequence_length"]
    model.graph.input.append(make_tensor_value_info("position_ids", onnx.TensorProto.INT64, axes))
    onnx.save(model, tmp_path / "model.onnx")
    decoder = opened(tmp_path)
    decoder.observed(CONTEXT)
    assert not decoder.takes_positions


def test_an_opset_that_onnxruntime_does_not_know_and_the_last_logits_alone_are_refused(tmp_path):
    model = onnx.load(write_graph(tmp_path / "model.onnx"))
    for node in model.graph.node:
        node.output[:] = ["whole" if name == "logits" else name for name in node.output]
    model.graph.node.append(make_node("Slice", ["whole", "begin", "end", "axis"], ["logits"]))
    for name, number in {"begin": -1, "end": np.iinfo(np.int64).max, "axis": 1}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([number]), name))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"returns logits of float32 \(2, 1, 61\) for ids \(2, 4\): expected"):
        opened(tmp_path).observed(CONTEXT)
    model.opset_import[0].version = 99
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match=f"onnxruntime {onnxruntime.__version__} cannot open .*install the newest"):
        opened(tmp_path)


def test_group_query_attention_in_a_file_stays_and_has_no_standard_graph(tmp_path):
    decoder = decoder_of(tmp_path)
    model, _ = decoder.graph("fused", decoder.observed(CONTEXT))
    ir.save(model, tmp_path / "model.onnx")
    fused = opened(tmp_path)
    observation = fused.observed(CONTEXT)
    assert observation.layers[0].special is None
    again, _ = fused.graph("fused", observation)
    assert sum(node.op_type == "GroupQueryAttention" for node in again.graph) == LAYERS
    with pytest.raises(ContractError, match="is GroupQueryAttention, which a standard graph does not have"):
        fused.graph("standard", observation)

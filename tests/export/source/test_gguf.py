"""GGUF files: tiny ones written here with the gguf library, and one of a trained model that answers questions."""

from __future__ import annotations

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
gguf = pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import InputError, MissingExtraError, MissingFileError
from pastkey.export import export
from pastkey.export.graft.probe.observe import natively, run_uncached
from pastkey.export.graph.stored import stored_weights
from pastkey.export.source import stored_tensors
from pastkey.export.source.gguf_tensors import TemporaryWeights
from pastkey.export.source.open import open_source
from pastkey.export.source.source import Opening
from pastkey.runtime import load

from ..tiny_llama import CONTEXT, PROMPT, TEMPLATE, VOCABULARY
from .opening import Refused, link_out
from .packed.gguf_blocks import write_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of each version others

WIDTH, HIDDEN, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
TEXTS = ("Once upon a time", " two  spaces", "äöü 🙂\n\ttab", "<|im_start|>user")


def write_gguf(file: Path, *, quantized: bool = False, architecture: str = "llama") -> Path:
    """A random Llama with a byte-level tokenizer and a chat template, in F32 or, its matrices, in Q8_0."""
    writer = gguf.GGUFWriter(file, architecture)
    for name, value in {
        "context_length": CONTEXT, "embedding_length": WIDTH, "block_count": LAYERS, "feed_forward_length": HIDDEN,
        "head_count": HEADS, "head_count_kv": KV_HEADS, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 50000.0,
        "rope_dimension_count": WIDTH // HEADS, "vocab_size": VOCABULARY,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    write_tokenizer(writer)
    rng = np.random.default_rng(0)
    kv = WIDTH // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (VOCABULARY, WIDTH), "output_norm": (WIDTH,), "output": (VOCABULARY, WIDTH),
    }  # fmt: skip
    block = {
        "attn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (kv, WIDTH), "attn_v": (kv, WIDTH),
        "attn_output": (WIDTH, WIDTH), "ffn_norm": (WIDTH,), "ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH),
        "ffn_down": (WIDTH, HIDDEN),
    }  # fmt: skip
    shapes |= {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()}
    for name, shape in shapes.items():
        weight = rng.normal(len(shape) == 1, 0.2, shape).astype(np.float32)
        if quantized and len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def reference(file: Path) -> Any:
    """transformers' own model of the same dequantized weights."""
    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float32, "attn_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options)


# --- what comes out -----------------------------------------------------------------------------------------------
@pytest.mark.oldest
@pytest.mark.slow
def test_the_bundle_writes_what_transformers_writes(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", quantized=True)
    export(file, tmp_path / "bundle", "fp32")
    ids = torch.tensor([PROMPT])
    options = {"do_sample": False, "max_new_tokens": 64, "pad_token_id": 0}
    found = reference(file).generate(ids, attention_mask=torch.ones_like(ids), **options)
    expected = found[0, len(PROMPT) :].tolist()
    assert len(expected) == 64
    assert len(set(expected)) > 10
    lm = load(tmp_path / "bundle")
    assert lm.generate(PROMPT, max_new_tokens=64).ids == expected
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert (manifest.source, manifest.context_length) == ("tiny", CONTEXT)
    assert (manifest.bos_token_id, manifest.eos_token_ids) == (0, (1,))
    config = json.loads((tmp_path / "bundle" / names.TOKENIZER_CONFIG).read_text())
    assert (config["tokenizer_class"], config["chat_template"]) == ("PreTrainedTokenizerFast", TEMPLATE)
    original = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    for text in TEXTS:
        assert lm.tokenizer.encode(text) == original(text)["input_ids"]


@pytest.mark.parametrize(("quantized", "room"), [(True, True), (True, False), (False, True)])
def test_weights_are_those_of_transformers_and_large_ones_go_to_the_disk_if_it_has_room(
    tmp_path, monkeypatch, quantized, room
):
    def full(self: TemporaryWeights, array: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    if not room:
        monkeypatch.setattr(TemporaryWeights, "add", full)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    monkeypatch.setattr(stored_tensors, "LARGE", 1000)
    file = write_gguf(tmp_path / "tiny.gguf", quantized=quantized)
    told: list[tuple[int, int, int]] = []
    module = open_source(file, Opening(before_loading=lambda *sizes: told.append(sizes))).module
    ((number, *places),) = told
    assert places == ([0, 4 * number] if room else [4 * number, 0])
    weights = stored_weights(module)
    assert len(list(weights.parameters(module)) if weights else []) == (2 + 7 * LAYERS if room else 0)
    ids = torch.tensor([PROMPT])
    with torch.no_grad(), natively(module):
        assert torch.equal(run_uncached(module, ids).logits, reference(file).eval()(input_ids=ids).logits)


# --- what cannot be read ------------------------------------------------------------------------------------------
def link_beside(file: Path, name: str) -> None:
    link_out(file.parent, name)


REFUSED: dict[str, Refused] = {
    **{
        f"{size} bytes": (partial(os.truncate, length=size), InputError, "cut short.*fetch it again")
        for size in (10, 3000, 400_000)
    },
    **{  # transformers reads these files of the folder too
        name: (partial(link_beside, name=name), InputError, f"{name} leads out of")
        for name in (names.TOKENIZER, names.CONFIG)
    },
    "unknown": (partial(write_gguf, architecture="foo"), InputError, r"cannot load .*tiny\.gguf: .*foo"),
    "gone": (Path.unlink, MissingFileError, "no such source"),
}


@pytest.mark.parametrize("spoilt", REFUSED)
def test_a_spoilt_file_is_refused(spoilt, tmp_path):
    spoil, error, word = REFUSED[spoilt]
    (tmp_path / "folder").mkdir()
    spoil(file := write_gguf(tmp_path / "folder" / "tiny.gguf"))
    with pytest.raises(error, match=word):
        open_source(file)


def test_a_package_that_is_not_installed_comes_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(MissingExtraError, match=r"type  pip install '\.\[huggingface\]' "):
        open_source(tmp_path / "tiny.gguf")

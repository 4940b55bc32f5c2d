"""GGUF files: tiny ones written here with the gguf library, and one of a trained model that answers questions."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
gguf = pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from benchmarks.environments import smollm2
from pastkey.__main__ import main
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

from ..tiny_llama import CONTEXT, PROMPT, TEMPLATE, VOCABULARY, bpe

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of each version others

WIDTH, HIDDEN, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
TEXTS = ("Once upon a time", " two  spaces", "äöü 🙂\n\ttab", "<|im_start|>user")


def write_gguf(file: Path, *, quantized: bool = False, architecture: str = "llama") -> Path:
    """A random Llama with a byte-level tokenizer and a chat template, in F32 or, its matrices, in Q8_0."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    _write_tokenizer(writer)
    rng = np.random.default_rng(0)
    kv = WIDTH // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCABULARY, WIDTH), "output_norm": (WIDTH,)}
    shapes["output"] = (VOCABULARY, WIDTH)
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm": (WIDTH,),
            f"blk.{i}.attn_q": (WIDTH, WIDTH),
            f"blk.{i}.attn_k": (kv, WIDTH),
            f"blk.{i}.attn_v": (kv, WIDTH),
            f"blk.{i}.attn_output": (WIDTH, WIDTH),
            f"blk.{i}.ffn_norm": (WIDTH,),
            f"blk.{i}.ffn_gate": (HIDDEN, WIDTH),
            f"blk.{i}.ffn_up": (HIDDEN, WIDTH),
            f"blk.{i}.ffn_down": (WIDTH, HIDDEN),
        }
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


def _write_tokenizer(writer: Any) -> None:
    vocabulary = json.loads(bpe(bos=False).backend_tokenizer.to_str())
    tokens = [token for token, _ in sorted(vocabulary["model"]["vocab"].items(), key=lambda entry: entry[1])]
    tokens += [f"[unused{i}]" for i in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if i < 3 else gguf.TokenType.NORMAL for i in range(VOCABULARY)])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)


def reference(file: Path) -> Any:
    """transformers' own model of the same dequantized weights."""
    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float32, "attn_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options)


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """What transformers writes with its own cache, up to the end that the model's configuration names."""
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, pad_token_id=0
    )
    return found[0, len(prompt) :].tolist()


# --- what comes out -----------------------------------------------------------------------------------------------
@pytest.mark.oldest
@pytest.mark.slow
def test_the_bundle_writes_what_transformers_writes(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", quantized=True)
    export(file, tmp_path / "bundle", "fp32")
    expected = greedy(reference(file), PROMPT, 64)
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
def linked_out(name: str) -> Callable[[Path], None]:
    """transformers reads these files of the folder too."""

    def spoil(file: Path) -> None:
        (file.parent.parent / "secret").write_text("{}")
        (file.parent / name).symlink_to(file.parent.parent / "secret")

    return spoil


def cut(size: int) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, size)


REFUSED: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    **{f"{size} bytes": (cut(size), InputError, "cut short.*fetch it again") for size in (10, 3000, 400_000)},
    **{name: (linked_out(name), InputError, f"{name} leads out of") for name in (names.TOKENIZER, names.CONFIG)},
    "unknown": (lambda file: write_gguf(file, architecture="foo"), InputError, r"cannot load .*tiny\.gguf: .*foo"),
    "gone": (Path.unlink, MissingFileError, "no such source"),
}  # fmt: skip


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
    with pytest.raises(MissingExtraError, match=r"type  pip install gguf  and .* \(pastkey's extras export,gguf\)"):
        open_source(tmp_path / "tiny.gguf")


# --- a trained model ----------------------------------------------------------------------------------------------
@pytest.mark.matrix  # minutes: SmolLM2-135M twice. Trained decoders that CI exports stand in tests/test_trained.py.
def test_a_trained_model_writes_what_transformers_writes_and_answers_in_int8(tmp_path, capsys):
    file = smollm2()
    assert main(["export", str(file), "--out", str(tmp_path / "fp32"), "--precision", "fp32"]) == 0
    model, lm = reference(file), load(tmp_path / "fp32")
    for prompt in ("Once upon a time", "The capital of France is", "def fibonacci(n):"):
        ids = lm.tokenizer.encode(prompt)
        expected, answer = greedy(model, ids, 64), lm.generate(ids, max_new_tokens=64)
        # transformers gives the EOS token with the rest.
        found = [*answer.ids, *(expected[-1:] if answer.finish_reason == "stop" else [])]
        assert found[-1] in lm.manifest.eos_token_ids or len(found) == 64
        for step, (token, other) in enumerate(zip(expected, found, strict=False)):
            if token != other:  # allowed only where two tokens are as likely as each other
                with torch.no_grad():
                    logits = model(torch.tensor([ids + expected[:step]])).logits[0, -1]
                assert abs(float(logits[token] - logits[other])) < 1e-4, (prompt, step)
                break
        else:
            assert len(found) == len(expected), prompt
    del model, lm

    assert main(["export", str(file), "--out", str(tmp_path / "int8")]) == 0
    capsys.readouterr()
    question = "What is the capital of France?"
    assert main(["chat", str(tmp_path / "int8"), "--prompt", question, "--json"]) == 0
    assert "Paris" in json.loads(capsys.readouterr().out)["text"]

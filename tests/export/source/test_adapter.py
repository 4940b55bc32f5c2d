"""A fine-tuned folder and an adapter are sources: the adapter is merged into its base."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch

from pastkey.contract import names
from pastkey.errors import InputError, IntegrityError, MissingFileError
from pastkey.export.source.open import open_source
from pastkey.train.loop import train
from pastkey.train.model import positions_like
from pastkey.train.pretrained import reopen
from pastkey.train.settings import TrainConfig

from ...train.helpers import tiny, write_corpus

pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from ..tiny_llama import TEMPLATE, bpe, llama
from .opening import change, write

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and peft's own
IDS = torch.tensor([[5, 17, 20, 9, 3, 11]])  # a checkpoint of characters has few


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Bases and the parts that were trained: "full" and "lora" of a Llama, "own-lora" of a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    llama(eos_token_id=1, bos_token_id=0).save_pretrained(folder / "llama")
    tokenizer: Any = bpe(bos=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "llama")
    text = write_corpus(folder / "text.txt")
    train(tiny(steps=1, save_every=1), folder / "own", data=[text])
    for out, base, lora in (("full", "llama", False), ("lora", "llama", True), ("own-lora", "own", True)):
        given = {"init": str(folder / base), "lora": lora, "steps": 2, "batch_size": 2, "context": 16, "threads": 1}
        train(TrainConfig.from_given(given | {"learning_rate": 1e-2}), folder / out, data=[text])
    return folder


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(IDS, positions_like(IDS))


@pytest.mark.parametrize("name", ["full", "lora", "own-lora"])
def test_the_source_computes_what_was_trained(name, trained):
    source = open_source(trained / name)
    expected = logits(reopen(trained / name).model)
    torch.testing.assert_close(logits(source.module), expected, rtol=1e-5, atol=1e-5)
    base = logits(open_source(trained / ("own" if name == "own-lora" else "llama")).module)
    assert (expected - base).abs().max() > 1e-2
    assert (source.name, source.warnings) == (name, ())
    if name != "own-lora":
        assert source.tokenizer_config["chat_template"] == TEMPLATE
        assert (source.eos_token_ids, source.context_length) == ((1,), 80)


def test_a_folder_of_peft_alone_is_merged(trained, tmp_path):
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(trained / "llama")
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(IDS).logits
    source = open_source(tmp_path / "adapter")
    torch.testing.assert_close(logits(source.module), expected, rtol=1e-5, atol=1e-5)
    assert source.tokenizer is not None  # the base's


def test_the_eos_tokens_of_the_base_end_texts_beside_that_of_the_adapters_tokenizer(trained, tmp_path):
    folder = shutil.copytree(trained / "lora", tmp_path / "lora")
    vocabulary = json.loads((folder / names.TOKENIZER).read_text())["model"]["vocab"]
    other = next(token for token, number in vocabulary.items() if number == 7)
    for eos, expected in ((other, (7, 1)), (None, (1,))):
        change(folder / names.TOKENIZER_CONFIG, eos_token=eos)
        assert open_source(folder).eos_token_ids == expected


def test_a_training_that_stopped_is_told(trained, tmp_path):
    folder = shutil.copytree(trained / "full", tmp_path / "full")
    training = json.loads((folder / names.MANIFEST).read_text())["training"]
    training["settings"]["steps"] = 9
    change(folder / names.MANIFEST, training=training)
    assert any("stopped at step 2 of 9" in warning for warning in open_source(folder).warnings)


def test_an_adapter_that_does_not_fit_is_named(trained, tmp_path):
    folder = shutil.copytree(trained / "lora", tmp_path / "lora")
    for base, kind, words in (
        ("gone/far/away", MissingFileError, r"is a peft adapter of gone/far/away, .* put it there"),
        (str(trained / "own"), InputError, "cannot merge"),
    ):
        change(folder / names.ADAPTER_CONFIG, base_model_name_or_path=base)
        with pytest.raises(kind, match=words):
            open_source(folder)
    (folder / names.ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(MissingFileError, match="has no adapter_model"):
        open_source(folder)
    with (trained / "full" / names.WEIGHTS).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(IntegrityError, match="1000 bytes"):
        open_source(trained / "full")


def test_an_adapter_whose_base_was_never_fetched_is_told_with_the_commands(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    write(tmp_path / names.ADAPTER_CONFIG, {"base_model_name_or_path": "some/base"})
    (tmp_path / names.ADAPTER_WEIGHTS).write_bytes(b"")
    with pytest.raises(MissingFileError, match="is a peft adapter of some/base") as caught:
        open_source(tmp_path)
    for command in ("pastkey export some/base --out base", f"pastkey run base --adapter {tmp_path}"):
        assert command in str(caught.value)

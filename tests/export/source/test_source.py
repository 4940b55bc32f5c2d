"""The sources that can be exported, how they are opened, and the sentences for the others."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pastkey.__main__ import main
from pastkey.contract import names
from pastkey.errors import InputError, IntegrityError, MissingFileError
from pastkey.export.source.open import open_source
from pastkey.export.source.source import Opening

from ..decoders import Plain
from .opening import Refused, change, opened, refusal, save, write


# --- a module -----------------------------------------------------------------------------------------------------
def test_a_module_brings_its_class_name_and_nothing_else():
    module = Plain()
    for given in (module, torch.compile(module, backend="eager")):
        source = opened(given)
        assert source.module is module
        assert (source.name, source.context_length) == ("Plain", 8)
        assert (source.tokenizer, source.config, source.eos_token_ids) == (None, {}, ())


@pytest.mark.parametrize("length", [None, 1, 8.0, True])
def test_a_context_length_is_a_whole_number_from_two(length):
    word = "on the command line, --context N" if length is None else f"the context length is {length!r}; it must be a"
    assert word in refusal(InputError, Plain(), context_length=length)


@pytest.mark.filterwarnings("ignore")  # torch's, that both ways are deprecated
def test_a_module_that_is_not_python_in_float_is_told():
    part = torch.nn.Linear(2, 2)
    traced = torch.jit.trace(part, torch.zeros(1, 2))
    rounded = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(part), {torch.nn.Linear})[0]
    for made, what in ((traced, "a module of TorchScript"), (rounded, "quantized already (Linear)")):
        assert refusal(InputError, torch.nn.Sequential(made)).startswith(f"0 of Sequential is {what}")


# --- a checkpoint -------------------------------------------------------------------------------------------------
@pytest.mark.oldest
def test_a_checkpoint_brings_its_context_tokenizer_configuration_and_end_token(checkpoint):
    source = open_source(checkpoint)
    assert (source.name, source.context_length, source.warnings) == ("checkpoint", 40, ())
    assert source.tokenizer == (checkpoint / names.TOKENIZER).read_bytes()
    assert source.eos_token_ids == (60,)
    assert source.config["model_type"] == "llama"
    assert source.tokenizer_config["eos_token"] == "<end>"
    source = open_source(checkpoint, Opening(context_length=16))
    assert (source.context_length, source.config["max_position_embeddings"]) == (16, 16)
    assert "--context 41 is more than the 40 tokens" in refusal(InputError, checkpoint, context_length=41)


def without_configuration(folder: Path) -> None:
    for file in folder.glob("*.json"):
        file.unlink()


DAMAGED: dict[str, Refused] = {
    "no folder": (shutil.rmtree, MissingFileError, "copy does not exist; expected a checkpoint, "),
    "no configuration": (without_configuration, MissingFileError, "has no config.json, as a Hugging"),
    "cut short": (lambda f: write(f / names.WEIGHTS, bytes(8)), IntegrityError, "model.safetensors has 8 bytes"),
    "a bundle": (lambda f: write(f / names.MANIFEST, {"kind": "bundle"}), InputError, "a checkpoint was expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_checkpoint_is_refused(name, checkpoint, tmp_path):
    damage, kind, words = DAMAGED[name]
    damage(copy := shutil.copytree(checkpoint, tmp_path / "copy"))
    assert words in refusal(kind, copy)


# --- a chat template ----------------------------------------------------------------------------------------------
def test_a_template_that_is_given_takes_the_place_of_the_own(word_tokenizer, checkpoint, tmp_path):
    path = save(word_tokenizer, tmp_path, eos_token="<end>", chat_template="own")
    write(tmp_path / names.CHAT_TEMPLATE, "own, in a file")
    write(tmp_path / "other.jinja", b"{{ messages }}\r\n")
    for source, tokenizer in ((Plain(vocab=61), path), (checkpoint, None)):
        config = opened(source, tokenizer=tokenizer, chat_template=tmp_path / "other.jinja").tokenizer_config
        assert (config["chat_template"], config["eos_token"]) == ("{{ messages }}\n", "<end>")
    assert "has no tokenizer" in refusal(InputError, Plain(), chat_template=tmp_path / "other.jinja")
    write(tmp_path / "binary.jinja", b"a\xff")
    assert "byte 1 is 0xff" in refusal(InputError, Plain(), tokenizer=path, chat_template=tmp_path / "binary.jinja")


# --- training -----------------------------------------------------------------------------------------------------
def stopped(folder: Path, **training: Any) -> Path:
    known = json.loads((folder / names.MANIFEST).read_text())["training"]
    change(folder / names.MANIFEST, training=known | training)
    return folder


def test_a_training_that_has_not_ended_is_told_with_the_command_that_goes_on(tmp_path):
    folder = tmp_path / "a folder"
    assert main(["train", "--preset", "classic", "--steps", "4", "--out", str(folder)]) == 0
    settings = json.loads((folder / names.MANIFEST).read_text())["training"]["settings"]
    assert open_source(folder).warnings == ()
    (sentence,) = open_source(stopped(folder, settings=settings | {"steps": 6})).warnings
    assert sentence.startswith(f"the training of {folder} stopped at step 4 of 6: continue with  pastkey train ")
    _, *command = shlex.split(sentence.split("continue with  ")[1].split("  and export again")[0])
    assert main(command) == 0
    assert open_source(folder).warnings == ()


@pytest.mark.parametrize(
    "training", [{"step": 3}, {"step": "3", "settings": {"steps": 5}}, {"step": 3, "settings": []}]
)
def test_a_checkpoint_without_a_training_is_not_told_of(training, checkpoint, tmp_path):
    assert open_source(stopped(shutil.copytree(checkpoint, tmp_path / "copy"), **training)).warnings == ()

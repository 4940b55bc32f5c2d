"""What can be exported, how it is opened, and the sentence where it cannot be."""

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
from pastkey.files.durable import write_json

from ..decoders import Plain
from .opening import opened, refusal, save


# --- a module -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compiled", [False, True])
def test_a_module_brings_its_class_name_and_nothing_else(compiled):
    module = Plain()
    source = opened(torch.compile(module, backend="eager") if compiled else module)
    assert source.module is module
    assert (source.name, source.context_length) == ("Plain", 8)
    assert (source.tokenizer, source.config, source.eos_token_ids) == (None, {}, ())


@pytest.mark.parametrize("length", [None, 1, 8.0, True])
def test_a_context_length_is_a_whole_number_from_two(length):
    word = "on the command line, --context N" if length is None else f"the context length is {length!r}; it must be a"
    assert word in refusal(InputError, Plain(), context_length=length)


@pytest.mark.filterwarnings("ignore")  # torch's, that both ways are deprecated
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda part: torch.jit.trace(part, torch.zeros(1, 2)), "0 of Sequential is a module of TorchScript"),
        (
            lambda part: torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(part), {torch.nn.Linear})[0],
            "0 of Sequential is quantized already (Linear)",
        ),
    ],
)
def test_a_module_that_is_not_python_in_float_is_told(make, what):
    module = torch.nn.Sequential(make(torch.nn.Linear(2, 2)))
    assert refusal(InputError, module).startswith(f"{what}: give the Python module in float")


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
    sentence = refusal(InputError, checkpoint, context_length=41)
    assert sentence == f"--context 41 is more than the 40 tokens that {checkpoint} was trained for"


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (shutil.rmtree, MissingFileError, "copy does not exist; expected a checkpoint, "),
        (lambda f: [file.unlink() for file in f.glob("*.json")], MissingFileError, "has no config.json, as a Hugging"),
        (lambda f: (f / names.WEIGHTS).write_bytes(bytes(8)), IntegrityError, "model.safetensors has 8 bytes"),
        (lambda f: (f / names.MANIFEST).write_text('{"kind": "bundle"}'), InputError, "a checkpoint was expected"),
    ],
    ids=["no folder", "no configuration", "cut short", "a bundle"],
)
def test_a_damaged_checkpoint_is_refused(damage, kind, words, checkpoint, tmp_path):
    damage(copy := shutil.copytree(checkpoint, tmp_path / "copy"))
    assert words in refusal(kind, copy)


# --- a chat template ----------------------------------------------------------------------------------------------
def test_a_template_that_is_given_takes_the_place_of_the_own(word_tokenizer, checkpoint, tmp_path):
    path = save(word_tokenizer, tmp_path, eos_token="<end>", chat_template="own")
    (tmp_path / names.CHAT_TEMPLATE).write_text("own, in a file")
    (tmp_path / "other.jinja").write_bytes(b"{{ messages }}\r\n")
    for source, tokenizer in ((Plain(vocab=61), path), (checkpoint, None)):
        config = opened(source, tokenizer=tokenizer, chat_template=tmp_path / "other.jinja").tokenizer_config
        assert (config["chat_template"], config["eos_token"]) == ("{{ messages }}\n", "<end>")


def test_a_template_that_cannot_be_used_is_told(word_tokenizer, tmp_path):
    path = save(word_tokenizer, tmp_path)
    (tmp_path / "binary.jinja").write_bytes(b"a\xff")
    (tmp_path / "good.jinja").write_text("{{ messages }}")
    for kind, given, tokenizer, words in (
        (MissingFileError, "none.jinja", path, "no such file"),
        (InputError, ".", path, "is a folder; a file was expected"),
        (InputError, "binary.jinja", path, "binary.jinja is not UTF-8 text: byte 1 is 0xff"),
        (InputError, "good.jinja", None, "Plain has no tokenizer, which a chat template needs: give one with --tok"),
    ):
        assert words in refusal(kind, Plain(vocab=61), tokenizer=tokenizer, chat_template=tmp_path / given)


# --- training -----------------------------------------------------------------------------------------------------
def stopped(folder: Path, **training: Any) -> Path:
    manifest = json.loads((folder / names.MANIFEST).read_text())
    manifest["training"] |= training
    write_json(folder / names.MANIFEST, manifest)
    return folder


def test_a_training_that_has_not_ended_is_told_with_the_command_that_goes_on(tmp_path):
    folder = tmp_path / "a folder"
    assert main(["train", "--preset", "classic", "--steps", "4", "--out", str(folder)]) == 0
    settings = json.loads((folder / names.MANIFEST).read_text())["training"]["settings"]
    assert open_source(folder).warnings == ()
    (sentence,) = open_source(stopped(folder, settings=settings | {"steps": 6})).warnings
    assert sentence.startswith(f"the training of {folder} stopped at step 4 of 6: go on with  pastkey train ")
    _, *command = shlex.split(sentence.split("go on with  ")[1].split("  and export again")[0])
    assert main(command) == 0
    assert open_source(folder).warnings == ()


@pytest.mark.parametrize(
    "training", [{"step": 3}, {"step": "3", "settings": {"steps": 5}}, {"step": 3, "settings": []}]
)
def test_a_checkpoint_without_a_training_is_not_told_of(training, checkpoint, tmp_path):
    assert open_source(stopped(shutil.copytree(checkpoint, tmp_path / "copy"), **training)).warnings == ()

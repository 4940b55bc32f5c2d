"""What can be exported, how it is opened, and the sentence where it cannot be."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn

from pastkey import names
from pastkey.errors import InputError, IntegrityError, MissingFileError, PastkeyError
from pastkey.export.source import check_tokenizer, open_source

from .decoders import Plain

MODEL = """
import torch
from torch import nn
from neighbour import WIDTH

class Model(nn.Module):
    def forward(self, input_ids, position_ids):
        return input_ids[..., None].expand(-1, -1, WIDTH).float()

def make():
    return Model()

def number():
    return 7

def fails():
    values = []
    return values[3]

def leaves():
    raise SystemExit(3)

constant = 5
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 4\n")
    (tmp_path / "mine.py").write_text(MODEL)
    return tmp_path / "mine.py"


def refusal(kind: type[PastkeyError], *arguments: Any, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        open_source(*arguments, **({"context_length": 8} | settings))
    return str(caught.value)


# --- a module -----------------------------------------------------------------------------------------------------
def test_a_module_brings_its_class_name_and_nothing_else() -> None:
    module = Plain()
    source = open_source(module, context_length=8)
    assert source.module is module
    assert (source.name, source.context_length) == ("Plain", 8)
    assert (source.tokenizer, source.config, source.eos_token_ids) == (None, {}, ())


def test_a_module_needs_a_context_length() -> None:
    assert "on the command line, --context N" in refusal(InputError, Plain(), context_length=None)


@pytest.mark.parametrize("length", [1, 0, -4, 8.0, True, "8"])
def test_a_context_length_is_a_whole_number_from_two(length: Any) -> None:
    sentence = refusal(InputError, Plain(), context_length=length)
    assert f"the context length is {length!r}; it must be a whole number of tokens from 2" in sentence


def test_a_compiled_module_is_taken_out_of_its_wrapping() -> None:
    module = Plain()
    source = open_source(torch.compile(module, backend="eager"), context_length=8)
    assert source.module is module
    assert source.name == "Plain"


# --- path/to/file.py:factory --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["make", "Model"])
def test_a_factory_or_a_class_gives_the_module_and_the_file_may_import_its_neighbours(name: str, file: Path) -> None:
    before = list(sys.path)
    source = open_source(f"{file}:{name}", context_length=8)
    assert isinstance(source.module, nn.Module)
    assert source.name == "Model"
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("missing", "has no function 'missing'; it defines Model, make, number, fails, leaves"),
        ("constant", "has no function 'constant'; it defines"),
        ("", "has no function ''; it defines"),
        ("number", "number() of {file} returned a int; a torch.nn.Module was expected"),
        ("fails", "fails() failed at {file}:18 with IndexError: list index out of range"),
        ("leaves", "leaves() failed at {file}:21 with SystemExit: 3"),
    ],
)
def test_a_factory_that_gives_no_module_is_told(name: str, sentence: str, file: Path) -> None:
    assert sentence.format(file=file) in refusal(InputError, f"{file}:{name}")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("import torch\nimport no_such_package\n", "importing failed at {file}:2 with ModuleNotFoundError"),
        ("def make(:\n", "importing failed at {file} with SyntaxError"),
        ("raise SystemExit('usage: mine.py --data FILE')\n", "importing failed at {file}:1 with SystemExit: usage"),
        ("def make(config): ...\n", "make() failed at {file} with TypeError: make() missing 1 required positional"),
    ],
)
def test_a_file_that_does_not_run_is_told_with_its_line(content: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(content)
    before = list(sys.path)
    assert sentence.format(file=file) in refusal(InputError, f"{file}:make")
    assert sys.path == before


def test_a_file_without_its_factory_is_told_what_to_write(file: Path) -> None:
    assert f"write {file}:NAME, where NAME() returns the module" in refusal(InputError, str(file))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    sentence = refusal(MissingFileError, f"{tmp_path}/none.py:make")
    assert sentence == f"no such file: {tmp_path}/none.py; expected path/to/file.py:factory"


# --- a checkpoint -------------------------------------------------------------------------------------------------
def test_a_checkpoint_brings_its_context_tokenizer_configuration_and_end_token(checkpoint: Path) -> None:
    source = open_source(checkpoint)
    assert (source.name, source.context_length) == ("checkpoint", 40)
    assert source.tokenizer == (checkpoint / names.TOKENIZER).read_bytes()
    assert source.eos_token_ids == (60,)
    assert source.config["model_type"] == "llama"
    assert source.tokenizer_config["eos_token"] == "<end>"


def test_the_context_of_a_checkpoint_can_be_shortened_but_not_stretched(checkpoint: Path) -> None:
    source = open_source(checkpoint, context_length=16)
    assert (source.context_length, source.config["max_position_embeddings"]) == (16, 16)
    sentence = refusal(InputError, checkpoint, context_length=41)
    assert sentence == f"--context 41 is more than the 40 tokens that {checkpoint} was trained for"


def test_a_missing_folder_is_told_what_a_source_is(tmp_path: Path) -> None:
    sentence = refusal(MissingFileError, tmp_path / "none")
    assert f"no such source: {tmp_path}/none does not exist" in sentence
    assert "a llama2.c .bin, or path/to/file.py:factory" in sentence


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    sentence = refusal(MissingFileError, tmp_path)
    assert f"{tmp_path} has no config.json, as a Hugging Face folder has, and no pastkey.json" in sentence


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (lambda f: (f / names.WEIGHTS).unlink(), IntegrityError, "model.safetensors is missing"),
        (lambda f: (f / names.WEIGHTS).write_bytes(b"short"), IntegrityError, "model.safetensors has 5 bytes"),
        (
            lambda f: (f / names.WEIGHTS).write_bytes((f / names.WEIGHTS).read_bytes()[:-1] + b"x"),
            IntegrityError,
            "model.safetensors was altered: its sha256 is",
        ),
        (
            lambda f: (f / names.MANIFEST).write_text(json.dumps({"kind": "checkpoint", "format_version": 99})),
            IntegrityError,
            "checkpoint format version 99; this pastkey reads up to 1: upgrade pastkey",
        ),
        (lambda f: (f / names.MANIFEST).write_text("{"), IntegrityError, "pastkey.json is not valid JSON"),
        (
            lambda f: (f / names.MANIFEST).write_text(json.dumps({"kind": "bundle", "format_version": 1})),
            InputError,
            "is a 'bundle' folder; a checkpoint was expected: name the checkpoint it came from",
        ),
    ],
    ids=["missing", "truncated", "altered", "newer", "no_json", "a_bundle"],
)
def test_a_damaged_checkpoint_is_refused_with_the_file(
    damage: Any, kind: type[PastkeyError], words: str, checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    damage(copy)
    assert words in refusal(kind, copy)


# --- tokenizers ---------------------------------------------------------------------------------------------------
def save(tokenizer: Tokenizer, folder: Path, **config: Any) -> Path:
    tokenizer.save(str(folder / names.TOKENIZER))
    if config:
        (folder / names.TOKENIZER_CONFIG).write_text(json.dumps(config))
    return folder / names.TOKENIZER


def test_a_tokenizer_brings_its_special_tokens_in_either_form(word_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = save(word_tokenizer, tmp_path, eos_token={"content": "<end>"}, bos_token="w3")
    for given in (path, tmp_path):  # the file, or its folder
        source = open_source(Plain(vocab=61), context_length=8, tokenizer=given)
        assert source.tokenizer == (tmp_path / names.TOKENIZER).read_bytes()
        assert (source.bos_token_id, source.eos_token_ids) == (3, (60,))


def test_a_tokenizer_without_a_configuration_has_no_special_tokens(word_tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = open_source(Plain(), context_length=8, tokenizer=save(word_tokenizer, tmp_path))
    assert (source.bos_token_id, source.eos_token_ids) == (None, ())
    assert source.tokenizer_config == {}


def test_a_chat_template_in_a_file_of_its_own_comes_into_the_configuration(
    word_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = save(word_tokenizer, tmp_path, eos_token="<end>", chat_template="in the configuration")
    source = open_source(Plain(vocab=61), context_length=8, tokenizer=path)
    assert source.tokenizer_config == {"eos_token": "<end>", "chat_template": "in the configuration"}
    template = "{{ messages }}\né\n"
    (tmp_path / names.CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    source = open_source(Plain(vocab=61), context_length=8, tokenizer=path)
    assert source.tokenizer_config == {"eos_token": "<end>", "chat_template": template}  # as transformers prefers it
    assert source.eos_token_ids == (60,)
    (tmp_path / names.CHAT_TEMPLATE).write_bytes(b"\xff")
    assert "chat_template.jinja is not valid UTF-8" in refusal(InputError, Plain(vocab=61), tokenizer=path)


def test_a_missing_tokenizer_is_told(tmp_path: Path) -> None:
    sentence = refusal(MissingFileError, Plain(), tokenizer=tmp_path / "none.json")
    assert sentence == f"no such tokenizer: {tmp_path}/none.json does not exist; expected a tokenizer.json"


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": {}}'])
def test_an_invalid_tokenizer_is_told(content: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    sentence = refusal(InputError, Plain(), tokenizer=file)
    assert f"{file} is not a tokenizer.json of the tokenizers library" in sentence


@pytest.mark.parametrize(
    "tokenizer",
    [
        Tokenizer(models.WordLevel({"a": 0, "b": 37}, unk_token="a")),
        Tokenizer(models.Unigram([(f"p{i}", 0.0) for i in range(38)])),
        Tokenizer(models.BPE({"a": 0, "b": 37}, [])),
    ],
    ids=["words", "unigram", "bpe"],
)
def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = open_source(Plain(), context_length=8, tokenizer=save(tokenizer, tmp_path))
    check_tokenizer(source, 38)
    with pytest.raises(InputError) as caught:
        check_tokenizer(source, 37)
    assert "makes token ids up to 37, but the model has 37 embeddings (ids 0 to 36)" in str(caught.value)


def test_added_tokens_count_too(word_tokenizer: Tokenizer, tmp_path: Path) -> None:
    copy = Tokenizer.from_str(word_tokenizer.to_str())
    copy.add_tokens(["further"])
    source = open_source(Plain(), context_length=8, tokenizer=save(copy, tmp_path))
    check_tokenizer(source, 62)
    with pytest.raises(InputError, match="up to 61"):
        check_tokenizer(source, 61)


def test_a_source_without_a_tokenizer_passes() -> None:
    check_tokenizer(open_source(Plain(), context_length=8), 1)

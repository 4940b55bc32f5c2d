"""What --tokenizer takes, and what becomes of it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from pastkey.contract import names
from pastkey.errors import InputError, IntegrityError, MissingFileError, PastkeyError
from pastkey.export.source.open import open_source
from pastkey.export.source.source import Source, check_tokenizer

from ...decoders import Plain


def refusal(kind: type[PastkeyError], *arguments: Any, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        open_source(*arguments, **({"context_length": 8} | settings))
    return str(caught.value)


# --- tokenizer.json ---
def save(tokenizer: Tokenizer, folder: Path, **config: Any) -> Path:
    tokenizer.save(str(folder / names.TOKENIZER))
    if config:
        (folder / names.TOKENIZER_CONFIG).write_text(json.dumps(config))
    return folder / names.TOKENIZER


def test_a_tokenizer_brings_its_special_tokens_in_either_form(word_tokenizer, tmp_path):
    path = save(word_tokenizer, tmp_path, eos_token={"content": "<end>"}, bos_token="w3")
    for given in (path, tmp_path):  # the file, or its folder
        source = open_source(Plain(vocab=61), context_length=8, tokenizer=given)
        assert source.tokenizer == (tmp_path / names.TOKENIZER).read_bytes()
        assert (source.bos_token_id, source.eos_token_ids) == (3, (60,))


def test_a_tokenizer_without_a_configuration_has_no_special_tokens(word_tokenizer, tmp_path):
    source = open_source(Plain(), context_length=8, tokenizer=save(word_tokenizer, tmp_path))
    assert (source.bos_token_id, source.eos_token_ids) == (None, ())
    assert source.tokenizer_config == {}


def test_a_chat_template_in_a_file_of_its_own_comes_into_the_configuration(word_tokenizer, tmp_path):
    path = save(word_tokenizer, tmp_path, eos_token="<end>", chat_template="in the configuration")
    source = open_source(Plain(vocab=61), context_length=8, tokenizer=path)
    assert source.tokenizer_config == {"eos_token": "<end>", "chat_template": "in the configuration"}
    template = "{{ messages }}\né\n"
    (tmp_path / names.CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    source = open_source(Plain(vocab=61), context_length=8, tokenizer=path)
    assert source.tokenizer_config == {"eos_token": "<end>", "chat_template": template}  # as transformers prefers it
    assert source.eos_token_ids == (60,)
    (tmp_path / names.CHAT_TEMPLATE).write_bytes(b"\xff")
    assert "chat_template.jinja is not UTF-8 text" in refusal(InputError, Plain(vocab=61), tokenizer=path)


@pytest.mark.parametrize("name", [names.TOKENIZER_CONFIG, names.CHAT_TEMPLATE])
def test_what_lies_beside_a_tokenizer_is_no_link_out_of_its_folder(name, word_tokenizer, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "folder").mkdir()
    path = save(word_tokenizer, tmp_path / "folder")
    (tmp_path / "folder" / name).symlink_to(tmp_path / "secret")
    assert f"{name} leads out of {path.parent}" in refusal(InputError, Plain(vocab=61), tokenizer=path)


def test_a_tokenizer_that_is_named_may_be_a_link(word_tokenizer, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.json").symlink_to(save(word_tokenizer, tmp_path / "folder"))
    source = open_source(Plain(vocab=61), context_length=8, tokenizer=tmp_path / "mine.json")
    assert source.tokenizer == (tmp_path / "folder" / names.TOKENIZER).read_bytes()


def test_a_missing_tokenizer_is_told(tmp_path):
    sentence = refusal(MissingFileError, Plain(), tokenizer=tmp_path / "none.json")
    assert f"no such tokenizer: {tmp_path}/none.json does not exist" in sentence


@pytest.mark.parametrize("content", ["{}", "not json"])
def test_an_invalid_tokenizer_is_told(content, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    sentence = refusal(IntegrityError, Plain(), tokenizer=file)
    assert f"{file} is not a tokenizer.json that can be read" in sentence


@pytest.mark.parametrize(
    "tokenizer",
    [
        Tokenizer(models.WordLevel({"a": 0, "b": 37}, unk_token="a")),
        Tokenizer(models.Unigram([(f"p{i}", 0.0) for i in range(38)])),
        Tokenizer(models.BPE({"a": 0, "b": 37}, [])),
    ],
    ids=["words", "unigram", "bpe"],
)
def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(tokenizer, tmp_path):
    source = open_source(Plain(), context_length=8, tokenizer=save(tokenizer, tmp_path))
    check_tokenizer(source, 38)
    with pytest.raises(InputError) as caught:
        check_tokenizer(source, 37)
    assert "makes token ids up to 37, but the model has 37 embeddings (ids 0 to 36)" in str(caught.value)


def test_added_tokens_count_too(word_tokenizer, tmp_path):
    copy = Tokenizer.from_str(word_tokenizer.to_str())
    copy.add_tokens(["further"])
    source = open_source(Plain(), context_length=8, tokenizer=save(copy, tmp_path))
    check_tokenizer(source, 62)
    with pytest.raises(InputError, match="up to 61"):
        check_tokenizer(source, 61)


# --- other forms ----------------------------------------------------------------------------------------------------
GPT2 = {"a": 0, "b": 1, "ab": 2}
FACTORY = """
from tokenizers import Tokenizer, models, pre_tokenizers

def make():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer

class Own:
    def pre_tokenize(self, text):
        pass

def custom():
    tokenizer = make()
    tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Own())
    return tokenizer

instance = make()
number = 7
"""


def opened(tokenizer: Path | str) -> Source:
    return open_source(Plain(), context_length=8, tokenizer=tokenizer)


def made(tokenizer: Path | str) -> Tokenizer:
    content = opened(tokenizer).tokenizer
    assert content is not None
    return Tokenizer.from_buffer(content)


@pytest.mark.parametrize("text", ["make", "instance", "Tokenizer.from_str(make().to_str())"])
def test_a_factory_may_give_a_tokenizer(text, tmp_path):
    (tmp_path / "mine.py").write_text(FACTORY)
    source = opened(f"{tmp_path}/mine.py:{text}")
    assert made(f"{tmp_path}/mine.py:{text}").encode("b a c").ids == [1, 0, 2]
    assert (source.bos_token_id, source.eos_token_ids) == (None, ())
    assert source.tokenizer_config == {"clean_up_tokenization_spaces": False, "add_bos_token": False}


def test_a_notebook_may_give_a_tokenizer_without_being_run(tmp_path):
    cells = [{"cell_type": "code", "source": FACTORY}, {"cell_type": "code", "source": "raise SystemError"}]
    (tmp_path / "lesson.ipynb").write_text(json.dumps({"cells": cells}))
    assert made(f"{tmp_path}/lesson.ipynb:instance").encode("b").ids == [1]


def test_a_factory_that_gives_no_tokenizer_is_told(tmp_path):
    (tmp_path / "mine.py").write_text(FACTORY)
    expected = "a tokenizers.Tokenizer, a tiktoken.Encoding, or the ids of characters or words was expected"
    for text, words in (
        ("number", f"number of {tmp_path}/mine.py is a int; {expected}"),
        ("lambda: 3.5", f"of {tmp_path}/mine.py returned a float; {expected}"),
        ("custom", f"custom of {tmp_path}/mine.py gives a Tokenizer that tokenizer.json cannot hold"),
        ("nothing", "has no function 'nothing'; it defines make, Own, custom"),
        ("", "names a file without its factory"),
    ):
        assert words in refusal(InputError, Plain(), tokenizer=f"{tmp_path}/mine.py:{text}")


def test_a_folder_is_searched_for_the_forms_in_order(tmp_path, word_tokenizer):
    assert "tokenizer.json does not exist; expected a tok" in refusal(MissingFileError, Plain(), tokenizer=tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\xff")
    assert "is not a SentencePiece model" in refusal(InputError, Plain(), tokenizer=tmp_path)
    (tmp_path / "encoder.json").write_text(json.dumps(GPT2))
    assert "is a vocabulary without its merges" in refusal(MissingFileError, Plain(), tokenizer=tmp_path)
    save(word_tokenizer, tmp_path)
    assert opened(tmp_path).tokenizer == (tmp_path / names.TOKENIZER).read_bytes()


def test_what_lies_beside_a_vocabulary_is_no_link_out_of_its_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "secret").write_text("a b")
    (tmp_path / "folder" / "vocab.bpe").symlink_to(tmp_path / "secret")
    (tmp_path / "folder" / "encoder.json").write_text(json.dumps(GPT2))
    assert "vocab.bpe leads out of" in refusal(InputError, Plain(), tokenizer=tmp_path / "folder")


def test_a_pickle_is_not_read(tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": {"a": 0}}))
    assert "meta.pkl is a pickle" in refusal(InputError, Plain(), tokenizer=tmp_path / "meta.pkl")


def test_characters_are_told_from_vocabularies(tmp_path):
    file = tmp_path / "mine.json"
    for content in ({"stoi": {"a": 0, "b": 1}}, {"a": 0, "b": 1, "<pad>": 2}, ["a", "b"], "ab"):
        file.write_text(json.dumps(content))
        assert made(file).encode("ba").ids == [1, 0]
    file.write_text(json.dumps({"\u0120the": 0, "\u0120a": 1, "a": 2}))
    assert "is a vocabulary without its merges" in refusal(MissingFileError, Plain(), tokenizer=file)
    file.write_text(json.dumps({"who": 0, "hunts": 1, "a": 2}))
    assert made(file).encode("a who").ids == [2, 0]


def test_a_notebook_or_a_file_may_give_words(tmp_path):
    text = 'token_to_id = {"what": 0, "is": 1, "<EOS>": 2}\nid_to_token = dict(map(reversed, token_to_id.items()))\n'
    (tmp_path / "mine.py").write_text(text)
    cells = [{"cell_type": "code", "source": text}, {"cell_type": "code", "source": "raise SystemError"}]
    (tmp_path / "lesson.ipynb").write_text(json.dumps({"cells": cells}))
    for given in ("mine.py:token_to_id", "mine.py:id_to_token", "lesson.ipynb:token_to_id"):
        assert made(f"{tmp_path}/{given}").encode("is what <EOS>").ids == [1, 0, 2]


# --- eos ------------------------------------------------------------------------------------------------------------
def test_an_eos_that_is_given_takes_the_place_of_the_own(word_tokenizer, tmp_path):
    path = save(word_tokenizer, tmp_path, eos_token="<end>")
    source = open_source(Plain(vocab=61), context_length=8, tokenizer=path, eos=(3, 5))
    assert source.eos_token_ids == (3, 5)
    check_tokenizer(source, 61, (3, 5))
    named = open_source(Plain(vocab=61), context_length=8, tokenizer=path, eos=("<end>", 5))
    assert named.eos_token_ids[1:] == (5,)
    assert named.eos_token_ids[0] == word_tokenizer.token_to_id("<end>")
    with pytest.raises(InputError, match="--eos '<EOS>' is no token of the tokenizer"):
        open_source(Plain(vocab=61), context_length=8, tokenizer=path, eos=("<EOS>",))
    with pytest.raises(InputError, match="--eos '<end>' is the name of a token, and there is no tokenizer"):
        open_source(Plain(vocab=61), context_length=8, eos=("<end>",))
    with pytest.raises(InputError, match="--eos 61 is no token of Plain, which has 61 embeddings"):
        check_tokenizer(source, 61, (3, 61))

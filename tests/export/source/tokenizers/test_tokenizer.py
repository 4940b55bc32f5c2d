"""The values of --tokenizer, and their results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from pastkey.contract import names
from pastkey.errors import InputError, IntegrityError, MissingFileError, PastkeyError
from pastkey.export.source.source import check_tokenizer
from pastkey.export.source.tokenizers.tokenizer import read_tokenizer

from ...decoders import Plain
from ..opening import link_out, opened, refusal, save, write, write_notebook

PLAIN = Plain(vocab=61)


# --- tokenizer.json ---
def test_a_tokenizer_brings_its_special_tokens_in_either_form(word_tokenizer, tmp_path):
    path = save(word_tokenizer, tmp_path, eos_token={"content": "<end>"}, bos_token="w3")
    for given in (path, tmp_path):  # the file, or its folder
        source = opened(PLAIN, tokenizer=given)
        assert source.tokenizer == (tmp_path / names.TOKENIZER).read_bytes()
        assert (source.bos_token_id, source.eos_token_ids) == (3, (60,))
    (tmp_path / names.TOKENIZER_CONFIG).unlink()
    source = opened(PLAIN, tokenizer=path)
    assert (source.bos_token_id, source.eos_token_ids, source.tokenizer_config) == (None, (), {})


def test_a_chat_template_in_a_file_of_its_own_comes_into_the_configuration(word_tokenizer, tmp_path):
    path = save(word_tokenizer, tmp_path, eos_token="<end>", chat_template="in the configuration")
    config = {"eos_token": "<end>", "chat_template": "in the configuration"}
    assert opened(PLAIN, tokenizer=path).tokenizer_config == config
    template = "{{ messages }}\né\n"
    write(tmp_path / names.CHAT_TEMPLATE, template)
    source = opened(PLAIN, tokenizer=path)
    assert source.tokenizer_config == config | {"chat_template": template}  # as transformers prefers it
    assert source.eos_token_ids == (60,)


def test_a_tokenizer_that_is_named_may_be_a_link(word_tokenizer, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.json").symlink_to(save(word_tokenizer, tmp_path / "folder"))
    source = opened(PLAIN, tokenizer=tmp_path / "mine.json")
    assert source.tokenizer == (tmp_path / "folder" / names.TOKENIZER).read_bytes()


def secret(file: Path) -> None:
    link_out(file.parent, file.name)


GPT2 = {"a": 0, "b": 1, "ab": 2}
# the files of a folder in addition to, or instead of, tokenizer.json
REFUSED: dict[str, tuple[dict[str, Any], type[PastkeyError], str]] = {
    "nothing": ({names.TOKENIZER: None}, MissingFileError, "no such tokenizer: .*tokenizer.json does not exist"),
    "an object": ({names.TOKENIZER: "{}"}, IntegrityError, "is not a tokenizer.json that can be read"),
    "no JSON": ({names.TOKENIZER: "not json"}, IntegrityError, "is not a tokenizer.json that can be read"),
    "a linked configuration": ({names.TOKENIZER_CONFIG: secret}, InputError, "_config.json leads out of"),
    "a linked template": ({names.CHAT_TEMPLATE: secret}, InputError, "jinja leads out of"),
    "a template that is no text": ({names.CHAT_TEMPLATE: b"\xff"}, InputError, "jinja is not UTF-8 text"),
    "SentencePiece": ({names.TOKENIZER: None, "tokenizer.model": b"\xff"}, InputError, "is not a SentencePiece model"),
    "no merges": (
        {names.TOKENIZER: None, "encoder.json": GPT2, "tokenizer.model": b"\xff"},
        MissingFileError, "is a vocabulary without its merges",
    ),
    "linked merges": (
        {names.TOKENIZER: None, "encoder.json": GPT2, "vocab.bpe": secret}, InputError, "vocab.bpe leads out of",
    ),
    "a pickle": ({"meta.pkl": b""}, InputError, "meta.pkl is a pickle"),
}  # fmt: skip


@pytest.mark.parametrize("spoilt", REFUSED)
def test_a_spoilt_folder_is_refused(spoilt, word_tokenizer, tmp_path):
    files, error, word = REFUSED[spoilt]
    folder = tmp_path / "folder"
    folder.mkdir()
    save(word_tokenizer, folder)
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        if callable(content):
            content(folder / name)
        elif content is not None:
            write(folder / name, content)
    given = folder / "meta.pkl" if spoilt == "a pickle" else folder
    assert re.search(word, refusal(error, PLAIN, tokenizer=given))


TOKENIZERS = {
    "words": Tokenizer(models.WordLevel({"a": 0, "b": 37}, unk_token="a")),
    "unigram": Tokenizer(models.Unigram([(f"p{i}", 0.0) for i in range(38)])),
    "bpe": Tokenizer(models.BPE({"a": 0, "b": 37}, [])),
    "an added token": Tokenizer(models.Unigram([(f"p{i}", 0.0) for i in range(37)])),
}
TOKENIZERS["an added token"].add_tokens(["further"])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(kind, tmp_path):
    source = opened(PLAIN, tokenizer=save(TOKENIZERS[kind], tmp_path))
    check_tokenizer(source, 38)
    with pytest.raises(InputError, match="makes token ids up to 37, but the model has 37 embeddings"):
        check_tokenizer(source, 37)


# --- other forms ----------------------------------------------------------------------------------------------------
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

"""


@pytest.fixture
def factory(tmp_path):
    return write(tmp_path / "mine.py", FACTORY)


def made(tokenizer: Path | str) -> Tokenizer:
    return Tokenizer.from_buffer(read_tokenizer(tokenizer)["tokenizer"])


@pytest.mark.parametrize("text", ["make", "Tokenizer.from_str(make().to_str())"])
def test_a_factory_may_give_a_tokenizer(text, factory):
    source = opened(PLAIN, tokenizer=f"{factory}:{text}")
    assert Tokenizer.from_buffer(source.tokenizer or b"").encode("b a c").ids == [1, 0, 2]
    assert (source.bos_token_id, source.eos_token_ids) == (None, ())
    assert source.tokenizer_config == {"clean_up_tokenization_spaces": False, "add_bos_token": False}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("7", "7 of {file} is a int; a tokenizers.Tokenizer"),
        ("lambda: 3.5", "of {file} returned a float; a tokenizers.Tokenizer"),
        ("custom", "custom of {file} gives a Tokenizer that tokenizer.json cannot hold"),
    ],
)
def test_a_factory_that_gives_no_tokenizer_is_told(text, words, factory):
    assert words.format(file=factory) in refusal(InputError, PLAIN, tokenizer=f"{factory}:{text}")


def test_characters_are_told_from_vocabularies(tmp_path):
    file = tmp_path / "mine.json"
    for content in ({"stoi": {"a": 0, "b": 1}}, {"a": 0, "b": 1, "<pad>": 2}, ["a", "b"], '"ab"'):
        assert made(write(file, content)).encode("ba").ids == [1, 0]
    assert made(write(file, {"who": 0, "hunts": 1, "a": 2})).encode("a who").ids == [2, 0]
    write(file, {"\u0120the": 0, "\u0120a": 1, "a": 2})
    assert "is a vocabulary without its merges" in refusal(MissingFileError, PLAIN, tokenizer=file)


def test_a_notebook_or_a_file_may_give_words(tmp_path):
    text = 'token_to_id = {"what": 0, "is": 1, "<EOS>": 2}\nid_to_token = dict(map(reversed, token_to_id.items()))\n'
    write(tmp_path / "mine.py", text)
    write_notebook(tmp_path / "lesson.ipynb", text, "raise SystemError")
    for given in ("mine.py:token_to_id", "mine.py:id_to_token", "lesson.ipynb:token_to_id"):
        assert made(f"{tmp_path}/{given}").encode("is what <EOS>").ids == [1, 0, 2]


# --- eos ------------------------------------------------------------------------------------------------------------
def test_an_eos_that_is_given_takes_the_place_of_the_own(word_tokenizer, tmp_path):
    path = save(word_tokenizer, tmp_path, eos_token="<end>")
    source = opened(PLAIN, tokenizer=path, eos=(3, 5))
    assert source.eos_token_ids == (3, 5)
    check_tokenizer(source, 61, (3, 5))
    assert opened(PLAIN, tokenizer=path, eos=("<end>", 5)).eos_token_ids == (60, 5)
    assert "'<EOS>' is not a token of the tokenizer" in refusal(InputError, PLAIN, tokenizer=path, eos=("<EOS>",))
    assert "'<end>' is the name of a token, and there is no" in refusal(InputError, PLAIN, eos=("<end>",))
    with pytest.raises(InputError, match="--eos 61 is not a token of Plain, which has 61 embeddings"):
        check_tokenizer(source, 61, (3, 61))

"""What --tokenizer takes, and what becomes of it."""

from __future__ import annotations

import json
import pickle
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
from ..opening import opened, refusal, save, write_notebook

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
    source = opened(PLAIN, tokenizer=path)
    assert source.tokenizer_config == {"eos_token": "<end>", "chat_template": "in the configuration"}
    template = "{{ messages }}\né\n"
    (tmp_path / names.CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    source = opened(PLAIN, tokenizer=path)
    assert source.tokenizer_config == {"eos_token": "<end>", "chat_template": template}  # as transformers prefers it
    assert source.eos_token_ids == (60,)
    (tmp_path / names.CHAT_TEMPLATE).write_bytes(b"\xff")
    assert "chat_template.jinja is not UTF-8 text" in refusal(InputError, PLAIN, tokenizer=path)


def test_a_tokenizer_that_is_named_may_be_a_link(word_tokenizer, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.json").symlink_to(save(word_tokenizer, tmp_path / "folder"))
    source = opened(PLAIN, tokenizer=tmp_path / "mine.json")
    assert source.tokenizer == (tmp_path / "folder" / names.TOKENIZER).read_bytes()


def linked_out(file: Path) -> None:
    (file.parent.parent / "secret").write_text("{}")
    file.symlink_to(file.parent.parent / "secret")


GPT2 = {"a": 0, "b": 1, "ab": 2}
# what a folder has beside, or in the place of, tokenizer.json
REFUSED: dict[str, tuple[dict[str, Any], type[PastkeyError], str]] = {
    "nothing": ({names.TOKENIZER: None}, MissingFileError, r"tokenizer\.json does not exist; expected a tok"),
    "an object": ({names.TOKENIZER: "{}"}, IntegrityError, r"tokenizer\.json is not a tokenizer\.json that can be"),
    "no JSON": ({names.TOKENIZER: "not json"}, IntegrityError, "is not a tokenizer.json that can be read"),
    "a linked configuration": ({names.TOKENIZER_CONFIG: linked_out}, InputError, "_config.json leads out of"),
    "a linked template": ({names.CHAT_TEMPLATE: linked_out}, InputError, "jinja leads out of"),
    "a template that is no text": ({names.CHAT_TEMPLATE: b"\xff"}, InputError, "jinja is not UTF-8 text"),
    "SentencePiece": (
        {names.TOKENIZER: None, "tokenizer.model": b"\xff"}, InputError, "is not a SentencePiece model",
    ),
    "no merges": (
        {names.TOKENIZER: None, "encoder.json": json.dumps(GPT2), "tokenizer.model": b"\xff"},
        MissingFileError, "is a vocabulary without its merges",
    ),
    "linked merges": (
        {names.TOKENIZER: None, "encoder.json": json.dumps(GPT2), "vocab.bpe": linked_out},
        InputError, "vocab.bpe leads out of",
    ),
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
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert re.search(word, refusal(error, PLAIN, tokenizer=folder))


def test_a_missing_tokenizer_and_a_pickle_are_told(tmp_path):
    sentence = refusal(MissingFileError, PLAIN, tokenizer=tmp_path / "none.json")
    assert f"no such tokenizer: {tmp_path}/none.json does not exist" in sentence
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": {"a": 0}}))
    assert "meta.pkl is a pickle" in refusal(InputError, PLAIN, tokenizer=tmp_path / "meta.pkl")


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
    source = opened(PLAIN, tokenizer=save(tokenizer, tmp_path))
    check_tokenizer(source, 38)
    with pytest.raises(InputError) as caught:
        check_tokenizer(source, 37)
    assert "makes token ids up to 37, but the model has 37 embeddings (ids 0 to 36)" in str(caught.value)


def test_added_tokens_count_too(word_tokenizer, tmp_path):
    copy = Tokenizer.from_str(word_tokenizer.to_str())
    copy.add_tokens(["further"])
    source = opened(PLAIN, tokenizer=save(copy, tmp_path))
    check_tokenizer(source, 62)
    with pytest.raises(InputError, match="up to 61"):
        check_tokenizer(source, 61)


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

instance = make()
number = 7
"""


def made(tokenizer: Path | str) -> Tokenizer:
    return Tokenizer.from_buffer(read_tokenizer(tokenizer)["tokenizer"])


@pytest.mark.parametrize("text", ["make", "instance", "Tokenizer.from_str(make().to_str())"])
def test_a_factory_may_give_a_tokenizer(text, tmp_path):
    (tmp_path / "mine.py").write_text(FACTORY)
    source = opened(PLAIN, tokenizer=f"{tmp_path}/mine.py:{text}")
    assert made(f"{tmp_path}/mine.py:{text}").encode("b a c").ids == [1, 0, 2]
    assert (source.bos_token_id, source.eos_token_ids) == (None, ())
    assert source.tokenizer_config == {"clean_up_tokenization_spaces": False, "add_bos_token": False}


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
        assert words in refusal(InputError, PLAIN, tokenizer=f"{tmp_path}/mine.py:{text}")


def test_characters_are_told_from_vocabularies(tmp_path):
    file = tmp_path / "mine.json"
    for content in ({"stoi": {"a": 0, "b": 1}}, {"a": 0, "b": 1, "<pad>": 2}, ["a", "b"], "ab"):
        file.write_text(json.dumps(content))
        assert made(file).encode("ba").ids == [1, 0]
    file.write_text(json.dumps({"\u0120the": 0, "\u0120a": 1, "a": 2}))
    assert "is a vocabulary without its merges" in refusal(MissingFileError, PLAIN, tokenizer=file)
    file.write_text(json.dumps({"who": 0, "hunts": 1, "a": 2}))
    assert made(file).encode("a who").ids == [2, 0]


def test_a_notebook_or_a_file_may_give_words(tmp_path):
    text = 'token_to_id = {"what": 0, "is": 1, "<EOS>": 2}\nid_to_token = dict(map(reversed, token_to_id.items()))\n'
    (tmp_path / "mine.py").write_text(text)
    write_notebook(tmp_path / "lesson.ipynb", text, "raise SystemError")
    for given in ("mine.py:token_to_id", "mine.py:id_to_token", "lesson.ipynb:token_to_id"):
        assert made(f"{tmp_path}/{given}").encode("is what <EOS>").ids == [1, 0, 2]


# --- eos ------------------------------------------------------------------------------------------------------------
def test_an_eos_that_is_given_takes_the_place_of_the_own(word_tokenizer, tmp_path):
    path = save(word_tokenizer, tmp_path, eos_token="<end>")
    source = opened(PLAIN, tokenizer=path, eos=(3, 5))
    assert source.eos_token_ids == (3, 5)
    check_tokenizer(source, 61, (3, 5))
    named = opened(PLAIN, tokenizer=path, eos=("<end>", 5))
    assert named.eos_token_ids[1:] == (5,)
    assert named.eos_token_ids[0] == word_tokenizer.token_to_id("<end>")
    with pytest.raises(InputError, match="--eos '<EOS>' is no token of the tokenizer"):
        opened(PLAIN, tokenizer=path, eos=("<EOS>",))
    with pytest.raises(InputError, match="--eos '<end>' is the name of a token, and there is no tokenizer"):
        opened(PLAIN, eos=("<end>",))
    with pytest.raises(InputError, match="--eos 61 is no token of Plain, which has 61 embeddings"):
        check_tokenizer(source, 61, (3, 61))

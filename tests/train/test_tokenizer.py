"""Tokenizers return the text they were given, and say what they add to it."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from pastkey.errors import InputError, IntegrityError, MissingFileError
from pastkey.train import tokenizer as module
from pastkey.train.tokenizer import END_OF_TEXT, lesson_tokenizer, make_tokenizer, read_tokenizer, train_bpe

TEXTS = ["the cat sat on the mat.\n", "Ein Kätzchen, 12 Mäuse\tund ein Haus 🏠.\r\n", "  two  spaces  "]
BPE = train_bpe(TEXTS * 20, 300)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_bpe_returns_any_text_unchanged(text):
    ids = BPE.tokenizer.encode(text).ids
    assert BPE.tokenizer.decode(ids, skip_special_tokens=False) == END_OF_TEXT + text
    assert all(0 <= token < BPE.vocab_size for token in ids)


def test_bpe_has_the_size_asked_for_and_is_the_same_every_time():
    assert BPE.vocab_size == 300
    assert train_bpe(TEXTS * 20, 300).tokenizer.to_str() == BPE.tokenizer.to_str()
    assert len(BPE.encode("the cat")) < len("the cat")
    assert train_bpe(TEXTS, 257).encode("ab") == [BPE.encode("a")[0], BPE.encode("b")[0]]


def test_a_run_without_spaces_is_learnt_from_in_pieces(capsys):
    letters = "".join(np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), 100_000))
    trained = train_bpe([letters], 600)
    assert trained.vocab_size == 600
    assert trained.decode(trained.encode(letters)) == letters
    # What other programs read is GPT-2's pre-tokenizer, as it was.
    assert json.loads(trained.tokenizer.to_str())["pre_tokenizer"]["type"] == "ByteLevel"
    assert capsys.readouterr().err == ""


def test_words_are_learnt_as_without_the_limit():
    text = "the quick brown fox, the lazy dog's 1234567 " * 20 + "x" * 255
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = [AddedToken(END_OF_TEXT, special=True, normalized=False)]
    trainer: Any = trainers.BpeTrainer  # whose stub names none of these
    options = {"initial_alphabet": alphabet, "special_tokens": specials, "show_progress": False}
    plain.train_from_iterator([text], trainer(vocab_size=320, **options))
    assert train_bpe([text], 320).tokenizer.get_vocab() == plain.get_vocab()


def test_bpe_needs_a_token_for_every_byte():
    with pytest.raises(InputError, match=r"--vocab-size is 256.*at least 257"):
        train_bpe(TEXTS, 256)


def test_characters_return_the_text_and_refuse_others():
    tokenizer = make_tokenizer("char", TEXTS, 0)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.prompt(text)) == text
        assert len(tokenizer.encode(text)) == len(text)
    with pytest.raises(InputError, match="does not know"):
        tokenizer.encode("the qat")


def test_words_keep_the_frequent_and_merge_the_rest():
    tokenizer = make_tokenizer("word", ["a a a b b c, c"] * 3, 6)
    assert tokenizer.vocab_size == 6
    assert tokenizer.decode(tokenizer.prompt("a, b c")) == "a , b c"
    assert tokenizer.encode("zebra") == [tokenizer.tokenizer.token_to_id("<unk>")]


@pytest.mark.parametrize("kind", ["bpe", "char", "word"])
def test_a_prompt_begins_with_the_token_that_ends_documents(kind):
    tokenizer = make_tokenizer(kind, TEXTS, 280)
    end = tokenizer.tokenizer.token_to_id(END_OF_TEXT)
    assert tokenizer.begin == tokenizer.end == end
    assert tokenizer.prompt("") == [end]
    assert tokenizer.prompt("the cat") == [end, *tokenizer.encode("the cat")]
    assert tokenizer.decode([end, *tokenizer.encode("cat")]) == "cat"
    assert tokenizer.documents(TEXTS, TEXTS) == [[end, *tokenizer.encode(text)] for text in TEXTS]


def test_the_configuration_says_what_is_added(tmp_path):
    added = {"add_bos_token": True, "add_eos_token": False, "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    of_lesson = {"add_bos_token": False, "add_eos_token": True, "bos_token": None, "eos_token": "<EOS>"}
    for tokenizer, expected in ((BPE, added), (lesson_tokenizer(), of_lesson)):
        tokenizer.save(tmp_path)
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert config.items() >= {"tokenizer_class": "PreTrainedTokenizerFast", **expected}.items()


@pytest.mark.parametrize(
    "tokenizer", [BPE, make_tokenizer("char", TEXTS, 0), lesson_tokenizer()], ids=["bpe", "char", "lesson"]
)
def test_transformers_reads_the_same_prompt(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    text = "what is statquest" if tokenizer.begin is None else "the cat sat"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns of its own deprecations
        theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
        assert theirs(text)["input_ids"] == tokenizer.prompt(text)
        assert theirs.eos_token_id == tokenizer.end
        assert theirs.decode(tokenizer.encode(text)) == text


def test_an_existing_tokenizer_is_read_with_its_own_end_token(tmp_path):
    lesson_tokenizer().save(tmp_path)
    found = make_tokenizer(str(tmp_path / "tokenizer.json"), [], 0)
    assert (found.begin, found.end) == (None, 4)  # its additions are after the prompt
    with pytest.raises(MissingFileError, match="bpe, char, word or the path"):
        make_tokenizer("bpee", [], 0)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"bad\.json is not a tokenizer\.json"):
        read_tokenizer(tmp_path / "bad.json")
    (tmp_path / "endless.json").write_text(BPE.tokenizer.to_str().replace("<|endoftext|>", "<b>"))
    with pytest.raises(InputError, match="no EOS token"):
        read_tokenizer(tmp_path / "endless.json")


def test_the_files_beside_a_tokenizer_name_its_template_and_its_tokens(tmp_path):
    BPE.tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": {"content": "a"}, "pad_token": None, "bos_token": "b"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "one"}))
    found = read_tokenizer(tmp_path / "tokenizer.json")
    assert found.tokenizer.id_to_token(found.end) == "a"
    assert (found.chat_template, found.special_tokens) == ("one", {"eos_token": "a", "bos_token": "b"})
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "two"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_tokenizer(tmp_path / "tokenizer.json").chat_template == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert read_tokenizer(tmp_path / "tokenizer.json").chat_template == "three"
    (tmp_path / "saved").mkdir()
    found.save(tmp_path / "saved")
    again = read_tokenizer(tmp_path / "saved" / "tokenizer.json")
    assert (again.end, again.chat_template) == (found.end, "one")


@given(st.text(alphabet="ab ", max_size=60), st.integers(1, 7))
def test_pieces_of_a_long_text_are_the_text(text, size):
    pieces = list(module._pieces(text, size))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 2 * size for piece in pieces) or text == ""

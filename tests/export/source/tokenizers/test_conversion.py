"""A tokenizer that was made is compared with what it was made from."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pastkey.errors import InputError
from pastkey.export.source.tokenizers.conversion import CHECKED, Conversion, sample_texts


@pytest.fixture
def letters():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


TEXTS = ["", "a", "ab", "ba"]


def test_the_same_two_hundred_texts_are_compared_each_time():
    texts = sample_texts()
    assert len(texts) == CHECKED == 200
    assert texts == sample_texts()
    assert len(set(texts)) > 190
    together = "".join(texts)
    assert all(part in together for part in ("\n", "\r\n", "   ", "\t", "日", "é", "1234567", "don't", "\u3000"))


def test_texts_of_few_characters_are_made_of_these_alone():
    texts = sample_texts(["a", "b"], [""])
    assert len(texts) == 200
    assert set("".join(texts)) == {"a", "b"}


def test_what_is_equal_becomes_the_fields_of_a_source(letters):
    made = Conversion(letters, lambda text: ["ab".index(c) for c in text], None, TEXTS, bos=0, eos=1, warnings=("w",))
    fields = made.fields("mine")
    assert json.loads(fields["tokenizer"])["model"]["vocab"] == {"a": 0, "b": 1}
    assert fields["tokenizer_config"] == {
        "clean_up_tokenization_spaces": False, "add_bos_token": False, "bos_token": "a", "eos_token": "b",
    }  # fmt: skip
    assert (fields["bos_token_id"], fields["eos_token_ids"], fields["warnings"]) == (0, (1,), ("w",))


def test_the_first_text_that_differs_is_told(letters):
    with pytest.raises(InputError, match=r"the ids \[0, 1\] for 'ab', and mine itself \[2\]"):
        Conversion(letters, lambda text: [2] if len(text) == 2 else [0] * len(text), None, TEXTS).fields("mine")


def test_a_text_that_comes_back_otherwise_is_told(letters):
    def encode(text: str) -> list[int]:
        return ["ab".index(character) for character in text]

    def decode(ids: list[int]) -> str:
        return "".join("aB"[number] for number in ids)

    with pytest.raises(InputError, match=r"decodes the ids \[0, 1\] to 'ab', and mine itself to 'aB'"):
        Conversion(letters, encode, decode, TEXTS).fields("mine")
    Conversion(letters, encode, decode, TEXTS, not_decoded=frozenset({1})).fields("mine")

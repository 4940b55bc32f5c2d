"""Lists of characters and of words, in the forms in which lessons write them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from pastkey.errors import InputError
from pastkey.export.source.tokenizers.characters import from_list

TEXT = "\n !'aAéß日🙂"
STOI = {character: number for number, character in enumerate(TEXT)}
ITOS = {str(number): character for number, character in enumerate(TEXT)}


def made(content: Any) -> Tokenizer:
    fields = from_list(json.loads(json.dumps(content)), "mine.json").fields("mine.json")
    assert (fields["bos_token_id"], fields["eos_token_ids"]) == (None, ())
    return Tokenizer.from_buffer(fields["tokenizer"])


@pytest.mark.parametrize(
    "content",
    [{"stoi": STOI, "itos": ITOS}, {"stoi": STOI}, {"itos": ITOS}, {"itos": list(TEXT)}, STOI, ITOS, list(TEXT), TEXT],
    ids=["both", "stoi", "itos", "itos as a list", "bare stoi", "bare itos", "list", "string"],
)
def test_every_form_gives_the_same_tokenizer(content):
    tokenizer = made(content)
    assert tokenizer.encode("a\n 日🙂a").ids == [4, 0, 1, 8, 9, 4]
    assert tokenizer.decode([4, 0, 1, 8, 9, 4]) == "a\n 日🙂a"
    assert tokenizer.get_vocab_size() == len(TEXT)


def test_ids_may_leave_gaps_and_begin_anywhere():
    assert made({"a": 7, "b": 3}).encode("ab").ids == [7, 3]


def test_an_unknown_character_is_refused_or_what_the_list_has_for_it():
    with pytest.raises(Exception, match="WordLevel error: Missing"):
        made({"a": 0}).encode("b")
    assert made({"a": 0, "<unk>": 1}).encode("ab").ids == [0, 1]


def test_longer_entries_are_special_tokens():
    tokenizer = made({"<pad>": 0, "a": 1, "<eos>": 2})
    assert tokenizer.encode("a<eos>").ids == [1, 2]
    assert tokenizer.decode([0, 1, 2]) == "a"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"stoi": {"a": "b", "c": 1}}, "is not a list of characters or words: expected their ids"),
        (["a", ""], "is not a list of characters"),
        ({"stoi": {"a": 0, "b": 0}}, "one id to 'a' and 'b'"),
        (["a", "b", "a"], "gives 'a' twice"),
        ({"stoi": {}}, "is empty"),
        ({"stoi": {"a": 0}, "itos": {"0": "b"}}, "stoi and itos of mine.json do not say the same"),
        (["<pad>", "<eos>"], "has no entry of one character"),
        ({"who": 0, "hunts": 0}, "one id to 'who' and 'hunts'"),
        ({"who": 0, "hunts": 2}, "has ids up to 2 and no word for 1"),
        ({"who": 0, "hunts": 1.5}, "whole numbers from 0"),
        ({"who": 0, "hunts": True}, "whole numbers from 0"),
        ({"who": 0, "hunts": "1"}, "whole numbers from 0"),
        (["who", "hunts at"], "'hunts at' has a space"),
        (["the", "play", "##ing"], "pieces of words such as '##ing'"),
        (["the</w>", "play", "ing</w>"], "pieces of words such as 'the</w>'"),
    ],
)
def test_what_is_no_list_of_characters_is_told(content, words):
    with pytest.raises(InputError) as caught:
        made(content)
    assert words in str(caught.value)


WORDS = {"what": 0, "is": 1, "a": 2, "cache": 3, "<EOS>": 4}


@pytest.mark.parametrize("content", [WORDS, {str(n): word for word, n in WORDS.items()}, list(WORDS)])
def test_words_are_read_between_spaces(content):
    tokenizer = made(content)
    assert tokenizer.encode("what is  a\ncache <EOS>").ids == [0, 1, 2, 3, 4]
    assert tokenizer.decode([0, 1, 2, 3, 4]) == "what is a cache"
    with pytest.raises(Exception, match="WordLevel error: Missing"):
        tokenizer.encode("what else")


def test_a_dictionary_of_python_has_whole_numbers_as_keys():
    fields = from_list({0: "what", 1: "is"}, "mine").fields("mine")
    assert Tokenizer.from_buffer(fields["tokenizer"]).encode("is what").ids == [1, 0]


def test_a_mark_among_words_is_told():
    (told,) = from_list(["hello", ",", "world"], "mine").fields("mine")["warnings"]
    assert told.startswith("mine has ',' among its words, and texts are cut at spaces alone")
    assert from_list(WORDS, "mine").fields("mine")["warnings"] == ()
    assert from_list("a,b", "mine").fields("mine")["warnings"] == ()

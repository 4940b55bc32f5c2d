"""Lists of characters, in the forms in which lessons write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from pastkey.errors import InputError
from pastkey.export.source.tokenizers.characters import from_characters

TEXT = "\n !'aAéß日🙂"
STOI = {character: number for number, character in enumerate(TEXT)}
ITOS = {str(number): character for number, character in enumerate(TEXT)}


def made(content: Any) -> Tokenizer:
    fields = from_characters(json.loads(json.dumps(content)), Path("mine.json")).fields("mine.json")
    assert (fields["bos_token_id"], fields["eos_token_ids"]) == (None, ())
    return Tokenizer.from_buffer(fields["tokenizer"])


@pytest.mark.parametrize(
    "content",
    [{"stoi": STOI, "itos": ITOS}, {"stoi": STOI}, {"itos": ITOS}, {"itos": list(TEXT)}, STOI, ITOS, list(TEXT), TEXT],
    ids=["both", "stoi", "itos", "itos as a list", "bare stoi", "bare itos", "list", "string"],
)
def test_every_form_gives_the_same_tokenizer(content: Any) -> None:
    tokenizer = made(content)
    assert tokenizer.encode("a\n 日🙂a").ids == [4, 0, 1, 8, 9, 4]
    assert tokenizer.decode([4, 0, 1, 8, 9, 4]) == "a\n 日🙂a"
    assert tokenizer.get_vocab_size() == len(TEXT)


def test_ids_may_leave_gaps_and_begin_anywhere() -> None:
    assert made({"a": 7, "b": 3}).encode("ab").ids == [7, 3]


def test_an_unknown_character_is_refused_or_what_the_list_has_for_it() -> None:
    with pytest.raises(Exception, match="WordLevel error: Missing"):
        made({"a": 0}).encode("b")
    assert made({"a": 0, "<unk>": 1}).encode("ab").ids == [0, 1]


def test_longer_entries_are_special_tokens() -> None:
    tokenizer = made({"<pad>": 0, "a": 1, "<eos>": 2})
    assert tokenizer.encode("a<eos>").ids == [1, 2]
    assert tokenizer.decode([0, 1, 2]) == "a"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"stoi": {"a": "b", "c": 1}}, "is not a list of characters: expected their ids"),
        (["a", ""], "is not a list of characters"),
        ({"stoi": {"a": 0, "b": 0}}, "gives a character twice or two characters one id"),
        ({"stoi": {}}, "is empty, or gives a character twice"),
        ({"stoi": {"a": 0}, "itos": {"0": "b"}}, "stoi and itos of mine.json do not say the same"),
        (["ab", "cd"], "has no entry of one character"),
    ],
)
def test_what_is_no_list_of_characters_is_told(content: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        made(content)
    assert words in str(caught.value)

"""Lists of characters and of words, in the forms in which lessons write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pastkey.errors import InputError, MissingFileError
from pastkey.export.source.tokenizers.byte_level import END_OF_TEXT, _characters, from_gpt2, from_tiktoken, merge
from pastkey.export.source.tokenizers.characters import from_list
from pastkey.export.source.tokenizers.conversion import CHECKED, Conversion, sample_texts

TEXT = "\n !'aAéß日🙂"
STOI = {character: number for number, character in enumerate(TEXT)}
ITOS = {str(number): character for number, character in enumerate(TEXT)}


def made(content: Any) -> Tokenizer:
    fields = from_list(json.loads(json.dumps(content)), "mine.json").fields("mine.json")
    assert (fields["bos_token_id"], fields["eos_token_ids"]) == (None, ())
    return Tokenizer.from_buffer(fields["tokenizer"])


FORMS = {
    "both": {"stoi": STOI, "itos": ITOS}, "stoi": {"stoi": STOI}, "itos": {"itos": ITOS},
    "itos as a list": {"itos": list(TEXT)}, "bare stoi": STOI, "bare itos": ITOS, "a list": list(TEXT), "a text": TEXT,
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tokenizer(form):
    tokenizer = made(FORMS[form])
    assert tokenizer.encode("a\n 日🙂a").ids == [4, 0, 1, 8, 9, 4]
    assert tokenizer.decode([4, 0, 1, 8, 9, 4]) == "a\n 日🙂a"
    assert tokenizer.get_vocab_size() == len(TEXT)


def test_ids_may_leave_gaps_longer_entries_are_special_and_an_unknown_character_is_refused_or_its_own():
    assert made({"a": 7, "b": 3}).encode("ab").ids == [7, 3]
    assert made({"a": 0, "<unk>": 1}).encode("ab").ids == [0, 1]
    with pytest.raises(Exception, match="WordLevel error: Missing"):
        made({"a": 0}).encode("b")
    tokenizer = made({"<pad>": 0, "a": 1, "<eos>": 2})
    assert tokenizer.encode("a<eos>").ids == [1, 2]
    assert tokenizer.decode([0, 1, 2]) == "a"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"stoi": {"a": "b", "c": 1}}, "is not a list of characters or words"),
        (["a", ""], "is not a list of characters"),
        ({"who": 0, "hunts": 1.5}, "whole numbers from 0"),
        ({"stoi": {"a": 0, "b": 0}}, "one id to 'a' and 'b'"),
        (["a", "b", "a"], "gives 'a' twice"),
        ({"stoi": {}}, "is empty"),
        ({"stoi": {"a": 0}, "itos": {"0": "b"}}, "stoi and itos of mine.json differ"),
        (["<pad>", "<eos>"], "has no entry of one character"),
        ({"who": 0, "hunts": 2}, "has ids up to 2 and no word for 1"),
        (["who", "hunts at"], "'hunts at' has a space"),
        (["the", "play", "##ing"], "pieces of words such as '##ing'"),
        (["the</w>", "play", "ing</w>"], "pieces of words such as 'the</w>'"),
    ],
)
def test_what_is_no_list_of_characters_is_told(content, words):
    with pytest.raises(InputError, match=words):
        made(content)


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
    assert told.startswith("mine has ',' among its words")
    for content in (WORDS, "a,b"):
        assert from_list(content, "mine").fields("mine")["warnings"] == ()


# --- a tokenizer that was made is compared with what it was made from ----------------------------------------------
@pytest.fixture
def letters():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def numbers(text: str) -> list[int]:
    return ["ab".index(character) for character in text if character in "ab"]


def test_the_same_two_hundred_texts_are_compared_each_time():
    texts = sample_texts()
    assert len(texts) == CHECKED == 200
    assert texts == sample_texts()
    assert len(set(texts)) > 190
    together = "".join(texts)
    assert all(part in together for part in ("\n", "\r\n", "   ", "\t", "日", "é", "1234567", "don't", "\u3000"))


def test_what_is_equal_becomes_the_fields_of_a_source(letters):
    fields = Conversion(letters, numbers, bos=0, eos=1, warnings=("w",)).fields("mine")
    assert json.loads(fields["tokenizer"])["model"]["vocab"] == {"a": 0, "b": 1}
    assert fields["tokenizer_config"] == {
        "clean_up_tokenization_spaces": False, "add_bos_token": False, "bos_token": "a", "eos_token": "b",
    }  # fmt: skip
    assert (fields["bos_token_id"], fields["eos_token_ids"], fields["warnings"]) == (0, (1,), ("w",))


def test_the_first_text_that_is_encoded_or_decoded_otherwise_is_told(letters):
    def decode(ids: list[int]) -> str:
        return "".join("aB"[number] for number in ids)

    with pytest.raises(InputError, match=r"the ids \[0, 0\] for 'snake_case', and mine itself \[0\]"):
        Conversion(letters, lambda text: numbers(text)[-1:]).fields("mine")
    with pytest.raises(InputError, match=r"decodes the ids \[0, 1\] to 'ab', and mine itself to 'aB'"):
        Conversion(letters, numbers, decode).fields("mine")
    Conversion(letters, numbers, decode, not_decoded=frozenset({1})).fields("mine")


# --- byte-level BPE: GPT-2's two files, and tiktoken's Encoding ----------------------------------------------------
# How people split texts before they merge, in tiktoken's own regular expressions.
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT4_WORDS = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
    r"\s+(?!\S)|\s"
)
CASES = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lo}\p{M}]*[\p{Ll}\p{Lo}\p{M}]+(?i:'s|'t)?|\p{N}{1,3}| ?[^\s\p{N}]+[\r\n/]*|\s+"
SOME_ONLY = r"\p{L}+|\p{N}{2,3}+\p{N}|[ \n]"  # the rest is dropped


@pytest.fixture(scope="module")
def trained():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options: Any = {"special_tokens": [END_OF_TEXT], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(sample_texts(), trainers.BpeTrainer(vocab_size=700, **options))
    return tokenizer


def files(tokenizer: Tokenizer, folder: Path, vocabulary: str, merges: str) -> tuple[dict[str, int], Path]:
    tokenizer.model.save(str(folder))
    (folder / "vocab.json").rename(folder / vocabulary)
    (folder / "merges.txt").rename(folder / merges)
    return json.loads((folder / vocabulary).read_text()), folder / vocabulary


@pytest.mark.parametrize(("vocabulary", "merges"), [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_gpt2s_two_files_give_its_tokenizer(vocabulary, merges, trained, tmp_path):
    fields = from_gpt2(*files(trained, tmp_path, vocabulary, merges)).fields("mine")
    made = Tokenizer.from_buffer(fields["tokenizer"])
    for text in sample_texts():
        assert made.encode(text).ids == trained.encode(text).ids
        assert made.decode(made.encode(text).ids) == text
    assert made.encode(f"a{END_OF_TEXT}").ids[1:] == [0]
    assert (fields["bos_token_id"], fields["eos_token_ids"]) == (0, (0,))
    assert fields["tokenizer_config"]["eos_token"] == END_OF_TEXT


def test_files_that_do_not_belong_together_are_told(trained, tmp_path):
    content, file = files(trained, tmp_path, "encoder.json", "vocab.bpe")
    with pytest.raises(InputError, match=r"vocab.bpe merges '.+', which .*encoder.json has no id for"):
        from_gpt2({text: number for text, number in content.items() if number < 300}, file)
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
    with pytest.raises(InputError, match=r"has no token for 255 of the 256 bytes"):
        from_gpt2({"a": 0, "bc": 1}, file)
    (tmp_path / "vocab.bpe").unlink()
    with pytest.raises(MissingFileError, match=r"put GPT-2's vocab.bpe or merges.txt next to it"):
        from_gpt2(content, file)


def test_the_lowest_rank_is_merged_first_from_the_left():
    ranks = {"aa": 1, "ab": 0, "aab": 2}

    def rank_of(left: str, right: str) -> int:
        return ranks.get(left + right, 9)

    assert merge(list("aaab"), rank_of, 9) == ["aa", "ab"]
    assert merge(list("aaaa"), rank_of, 9) == ["aa", "aa"]
    assert merge(list("aaab"), rank_of, 1) == ["a", "a", "ab"]
    assert merge([], rank_of, 9) == []


# --- tiktoken -------------------------------------------------------------------------------------------------------
def encoding_of(tokenizer: Tokenizer, pattern: str, specials: dict[str, int]) -> Any:
    """tiktoken's Encoding, with the vocabulary in its order as ranks."""
    byte_of = {character: byte for byte, character in enumerate(_characters())}
    vocabulary = tokenizer.get_vocab()
    texts = sorted(vocabulary.keys() - {END_OF_TEXT}, key=lambda text: vocabulary[text])
    ranks = {bytes(byte_of[character] for character in text): rank for rank, text in enumerate(texts)}
    tiktoken = pytest.importorskip("tiktoken")
    return tiktoken.Encoding("mine", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)


@pytest.mark.parametrize("pattern", [GPT2_WORDS, GPT4_WORDS, CASES, SOME_ONLY])
def test_an_encoding_of_tiktoken_gives_equal_ids_on_every_text(pattern, trained):
    encoding = encoding_of(trained, pattern, {END_OF_TEXT: 702, "<|b|>": 700})
    assert from_tiktoken(encoding).fields("mine")["eos_token_ids"] == (702,)


def test_an_encoding_whose_words_are_read_otherwise_is_refused(trained):
    with pytest.raises(InputError, match=r"the tokenizer.json made of mine gives the ids"):
        from_tiktoken(encoding_of(trained, r"\w+|[^\w\s]", {})).fields("mine")

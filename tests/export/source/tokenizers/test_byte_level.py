"""Byte-level BPE: GPT-2's two files, and tiktoken's Encoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pastkey.errors import InputError, MissingFileError
from pastkey.export.source.tokenizers.byte_level import END_OF_TEXT, from_gpt2, from_tiktoken, merge
from pastkey.export.source.tokenizers.conversion import sample_texts

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
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts(), trainer)
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
    with pytest.raises(MissingFileError, match=r"put GPT-2's vocab.bpe or merges.txt beside it"):
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


@pytest.mark.parametrize("pattern", [GPT2_WORDS, GPT4_WORDS, CASES, SOME_ONLY])
def test_an_encoding_of_tiktoken_gives_equal_ids_on_every_text(pattern, trained):
    tiktoken = pytest.importorskip("tiktoken")
    encoding = tiktoken.Encoding(
        "mine", pat_str=pattern, mergeable_ranks=ranks(trained), special_tokens={END_OF_TEXT: 702, "<|b|>": 700}
    )
    fields = from_tiktoken(encoding).fields("mine")
    assert fields["eos_token_ids"] == (702,)


def test_an_encoding_whose_words_are_read_otherwise_is_refused(trained):
    tiktoken = pytest.importorskip("tiktoken")
    encoding = tiktoken.Encoding("mine", pat_str=r"\w+|[^\w\s]", mergeable_ranks=ranks(trained), special_tokens={})
    with pytest.raises(InputError, match=r"the tokenizer.json made of mine gives the ids"):
        from_tiktoken(encoding).fields("mine")


def ranks(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Ranks as tiktoken has them: the vocabulary in its order, as bytes."""
    decoder: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    byte_of = {decoder.pre_tokenize_str(chr(b))[0][0]: b for b in range(128)}
    alphabet = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c not in byte_of]
    for character in "".join(chr(code) for code in (*range(0xA1, 0xAD), *range(0xAE, 0x100))):
        byte_of.setdefault(character, ord(character))
    rest = sorted(set(range(256)) - set(byte_of.values()))
    byte_of |= dict(zip([c for c in alphabet if c not in byte_of], rest, strict=True))
    ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    texts = [text for text, _ in ordered if text != END_OF_TEXT]
    return {bytes(byte_of[character] for character in text): rank for rank, text in enumerate(texts)}

"""A SentencePiece .model as tokenizer.json, read by ourselves and compared with the package where that is installed."""

from __future__ import annotations

import random
import struct
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from pastkey.errors import InputError
from pastkey.export.source.tokenizers.sentencepiece import from_sentencepiece, merges_by_score, read_model

from ....shared import divided

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE, WORD, CHARACTER = range(1, 5)


# --- a model written by hand ----------------------------------------------------------------------------------------
def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def piece(text: str, score: float = 0.0, kind: int = NORMAL) -> bytes:
    return field(1, field(1, text.encode()) + field(2, score) + field(3, kind))


SPECIALS = [piece("<unk>", kind=UNKNOWN), piece("<s>", kind=CONTROL), piece("</s>", kind=CONTROL)]
LETTERS = [piece(letter, -10.0 - number) for number, letter in enumerate("▁abc")]
WORDS = [piece("ab", -1.0), piece("bc", -0.5), piece("▁a", -2.0), piece("abc", -3.0), piece("▁abc", -4.0)]


def write(folder: Path, kind: int, pieces: list[bytes], trainer: bytes = b"", normalizer: bytes = b"") -> Path:
    file = folder / "mine.model"
    file.write_bytes(b"".join(pieces) + field(2, field(3, kind) + trainer) + field(3, normalizer))
    return file


def made(file: Path) -> Tokenizer:
    return Tokenizer.from_buffer(from_sentencepiece(file).fields(file)["tokenizer"])  # compared where it can be


def tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    return list(tokenizer.encode(text).tokens)


def test_bpe_makes_the_piece_of_the_highest_score_first(tmp_path):
    tokenizer = made(write(tmp_path, BPE, SPECIALS + LETTERS + WORDS[:-1]))
    assert tokens(tokenizer, "abc") == ["▁a", "bc"]
    assert tokens(tokenizer, "  ab  abc ") == ["▁", "ab", "▁a", "bc"]
    assert tokenizer.decode(tokenizer.encode("ab abc").ids) == "ab abc"


def test_unigram_takes_the_pieces_of_the_highest_sum(tmp_path):
    tokenizer = made(write(tmp_path, UNIGRAM, SPECIALS + LETTERS + WORDS))
    assert tokens(tokenizer, "abc") == ["▁a", "bc"]
    assert tokens(tokenizer, "abc abab") == ["▁a", "bc", "▁", "ab", "ab"]


def test_unknown_characters_are_bytes_where_the_model_has_them(tmp_path):
    in_bytes = [piece(f"<0x{byte:02X}>", kind=BYTE) for byte in range(256)]
    tokenizer = made(write(tmp_path, BPE, SPECIALS + in_bytes + LETTERS, trainer=field(35, 1)))
    assert tokens(tokenizer, "aé") == ["▁", "a", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("aé").ids) == "aé"


@pytest.mark.parametrize("kind", [UNIGRAM, BPE])
def test_user_defined_pieces_are_whole_and_survive_normalizing(kind, tmp_path):
    own = [piece("\n", kind=USER_DEFINED), piece("(a)", kind=USER_DEFINED)]
    tokenizer = made(write(tmp_path, kind, SPECIALS + own + LETTERS))
    assert tokenizer.encode("a\n(a)b").ids == [5, 6, 3, 4, 7]


def test_special_tokens_have_the_ids_that_the_training_gave_them(tmp_path):
    conversion = from_sentencepiece(write(tmp_path, BPE, SPECIALS + LETTERS))
    assert (conversion.bos, conversion.eos) == (1, 2)
    assert conversion.tokenizer.encode("a</s>").ids == [3, 4, 2]
    conversion = from_sentencepiece(write(tmp_path, BPE, SPECIALS + LETTERS, trainer=field(41, -1) + field(42, 1)))
    assert (conversion.bos, conversion.eos) == (None, 1)


@pytest.mark.parametrize(
    ("kind", "pieces", "trainer", "normalizer", "words"),
    [
        (WORD, [], b"", b"", "a model of whole words"),
        (BPE, [], field(24, 1), b"", "spaces as the end of a word"),
        (BPE, [], b"", field(5, 0), "spaces that it does not escape"),
        (BPE, [piece("old", kind=UNUSED)], b"", b"", "pieces that are not used ('old')"),
    ],
)
def test_what_tokenizer_json_has_no_words_for_is_refused(kind, pieces, trainer, normalizer, words, tmp_path):
    with pytest.raises(InputError) as caught:
        made(write(tmp_path, kind, SPECIALS + LETTERS + pieces, trainer, normalizer))
    assert f"{tmp_path}/mine.model has {words}" in str(caught.value)
    assert "which pastkey cannot convert: give a tokenizer.json of your own making" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff" * 20, "is not a SentencePiece model, or was cut short"),
        (b"".join(SPECIALS)[:-3], "is not a SentencePiece model, or was cut short"),
        (field(1, field(1, b"\xff")), "is not a SentencePiece model, or was cut short"),
        (b"", "its 0 pieces are not one unknown and others, each once"),
        (b"".join([*SPECIALS, piece("a"), piece("a")]), "its 5 pieces are not one unknown"),
    ],
)
def test_what_is_no_model_is_told(content, words, tmp_path):
    (tmp_path / "mine.model").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_model(tmp_path / "mine.model")
    assert words in str(caught.value)


def test_pairs_are_in_the_order_of_what_they_make():
    assert merges_by_score({"a": -9.0, "b": -9.0, "ab": -2.0, "aba": -1.0}) == [("ab", "a"), ("a", "b")]


def test_without_the_package_it_says_that_nothing_was_compared(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (sentence,) = from_sentencepiece(write(tmp_path, BPE, SPECIALS + LETTERS)).fields("mine")["warnings"]
    assert "not compared with the original" in sentence
    assert "type  pip install sentencepiece" in sentence


# --- models that the package trains ---------------------------------------------------------------------------------
STORY = "once upon a time there was a little dog who said hello to everyone naïve Größe 日本語 don't 1234"


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "spaces kept": {"remove_extra_whitespaces": False},
    "no prefix": {"remove_extra_whitespaces": False, "add_dummy_prefix": False},
    "own symbols": {"user_defined_symbols": ["\n", "<sep>"]},
    "own line breaks": {
        "user_defined_symbols": ["\n\n", "\n", "  "],
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
    },
    "bytes": {"split_digits": True, "pad_id": 3, "bos_id": -1, "byte_fallback": True},
}
TRAINED = [*product(("bpe", "unigram", "char"), ("nmt_nfkc", "identity", "nfkc_cf"), OPTIONS)]


@pytest.mark.parametrize(("kind", "rule", "name"), divided(TRAINED, quick=TRAINED[::4], ci=TRAINED[::2]))
def test_a_trained_model_gives_equal_ids_on_every_text(kind, rule, name, tmp_path):
    package, options = pytest.importorskip("sentencepiece"), OPTIONS[name]
    if kind == "char" and options.get("byte_fallback"):
        pytest.skip("its trainer knows no bytes for characters")
    choose = random.Random(1)
    lines = [" ".join(choose.choice(STORY.split()) for _ in range(12)) for _ in range(300)]
    (tmp_path / "text").write_text("\n".join(lines), encoding="utf-8")
    package.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "mine"),
        vocab_size=400,
        hard_vocab_limit=False,
        model_type=kind,
        normalization_rule_name=rule,
        minloglevel=2,
        **options,
    )
    fields = from_sentencepiece(tmp_path / "mine.model").fields("mine.model")
    assert fields["warnings"] == ()
    assert len(fields["eos_token_ids"]) == 1

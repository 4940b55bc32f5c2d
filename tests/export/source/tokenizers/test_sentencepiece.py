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
from pastkey.export.source.tokenizers.sentencepiece import from_sentencepiece, merges_by_score

from ....shared import divided
from ..opening import write

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE, WORD, CHARACTER = range(1, 5)


# --- a model of the test's own --------------------------------------------------------------------------------------
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


def model(kind: int, pieces: list[bytes], trainer: bytes = b"", normalizer: bytes = b"") -> bytes:
    return b"".join([*SPECIALS, *pieces]) + field(2, field(3, kind) + trainer) + field(3, normalizer)


def made(file: Path) -> Tokenizer:
    return Tokenizer.from_buffer(from_sentencepiece(file).fields(file)["tokenizer"])  # compared where it can be


@pytest.mark.parametrize("kind", [UNIGRAM, BPE])
def test_user_defined_pieces_are_whole_and_survive_normalizing(kind, tmp_path):
    own = [piece("\n", kind=USER_DEFINED), piece("(a)", kind=USER_DEFINED)]
    tokenizer = made(write(tmp_path / "mine.model", model(kind, own + LETTERS)))
    assert tokenizer.encode("a\n(a)b").ids == [5, 6, 3, 4, 7]


def test_special_tokens_have_the_ids_that_the_training_gave_them(tmp_path):
    conversion = from_sentencepiece(write(tmp_path / "mine.model", model(BPE, LETTERS)))
    assert (conversion.bos, conversion.eos) == (1, 2)
    assert conversion.tokenizer.encode("a</s>").ids == [3, 4, 2]
    given = field(41, -1) + field(42, 1)
    conversion = from_sentencepiece(write(tmp_path / "mine.model", model(BPE, LETTERS, trainer=given)))
    assert (conversion.bos, conversion.eos) == (None, 1)


REFUSED: dict[str, tuple[bytes, str]] = {
    "whole words": (model(WORD, LETTERS), "a model of whole words"),
    "spaces behind words": (model(BPE, LETTERS, trainer=field(24, 1)), "spaces as the end of a word"),
    "spaces as they are": (model(BPE, LETTERS, normalizer=field(5, 0)), "spaces that it does not escape"),
    "unused": (model(BPE, [*LETTERS, piece("old", kind=UNUSED)]), r"pieces that are not used \('old'\)"),
    "no fields": (b"\xff" * 20, "is not a SentencePiece model, or was cut short"),
    "cut": (b"".join(SPECIALS)[:-3], "is not a SentencePiece model, or was cut short"),
    "not UTF-8": (field(1, field(1, b"\xff")), "is not a SentencePiece model, or was cut short"),
    "empty": (b"", "its 0 pieces are not one unknown and others, each once"),
    "twice": (b"".join([*SPECIALS, piece("a"), piece("a")]), "its 5 pieces are not one unknown"),
}


@pytest.mark.parametrize("spoilt", REFUSED)
def test_what_is_no_model_or_cannot_be_a_tokenizer_json_is_refused(spoilt, tmp_path):
    content, words = REFUSED[spoilt]
    with pytest.raises(InputError, match=f"{tmp_path}/mine.model.*{words}|{words}.*{tmp_path}/mine.model"):
        made(write(tmp_path / "mine.model", content))


def test_pairs_are_in_the_order_of_what_they_make():
    assert merges_by_score({"a": -9.0, "b": -9.0, "ab": -2.0, "aba": -1.0}) == [("ab", "a"), ("a", "b")]


def test_without_the_package_it_says_that_nothing_was_compared(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (sentence,) = from_sentencepiece(write(tmp_path / "m.model", model(BPE, LETTERS))).fields("mine")["warnings"]
    assert "not compared with the original" in sentence


# --- models that the package trains ---------------------------------------------------------------------------------
STORY = "once upon a time there was a little dog who said hello to everyone naïve Größe 日本語 don't 1234"


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "spaces kept": {"remove_extra_whitespaces": False},
    "no prefix": {"remove_extra_whitespaces": False, "add_dummy_prefix": False},
    "own symbols": {"user_defined_symbols": ["\n", "<sep>"]},
    "own line breaks": {
        "user_defined_symbols": ["\n\n", "\n", "  "], "remove_extra_whitespaces": False, "byte_fallback": True,
    },
    "bytes": {"split_digits": True, "pad_id": 3, "bos_id": -1, "byte_fallback": True},
}  # fmt: skip
TRAINED = [
    (kind, rule, name)
    for kind, rule, name in product(("bpe", "unigram", "char"), ("nmt_nfkc", "identity", "nfkc_cf"), OPTIONS)
    if not (kind == "char" and "byte_fallback" in OPTIONS[name])  # its trainer knows no bytes for characters
]


@pytest.mark.parametrize(("kind", "rule", "name"), divided(TRAINED, quick=TRAINED[::4], ci=TRAINED[::2]))
def test_a_trained_model_gives_equal_ids_on_every_text(kind, rule, name, tmp_path):
    package, options = pytest.importorskip("sentencepiece"), OPTIONS[name]
    choose = random.Random(1)
    lines = [" ".join(choose.choice(STORY.split()) for _ in range(12)) for _ in range(300)]
    package.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "mine"), vocab_size=400, hard_vocab_limit=False,
        model_type=kind, normalization_rule_name=rule, minloglevel=2, **options,
    )  # fmt: skip
    fields = from_sentencepiece(tmp_path / "mine.model").fields("mine.model")
    assert fields["warnings"] == ()
    assert len(fields["eos_token_ids"]) == 1

"""An untrusted tokenizer.json, within its bounds."""

from __future__ import annotations

import json
from typing import Any

import pytest

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import Tokenizer

from pastkey.errors import IntegrityError
from pastkey.files.tokenizer_file import open_tokenizer, require_dense

WHOLE: dict[str, Any] = json.loads(Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).to_str())


def replace(pattern: Any, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def opened(**parts: Any) -> Tokenizer:
    return open_tokenizer(Tokenizer, json.dumps(WHOLE | parts).encode(), "t.json")


def test_a_tokenizer_is_opened_without_cutting_and_padding():
    assert opened().encode("a").ids == [0]
    padding = {
        "strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "a",
    }  # fmt: skip
    assert opened(padding=padding).encode("a").ids == [0]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"normalizer": sequence(*35 * [replace({"String": "a"}, "aa")])}, "more than 64 times as long"),
        ({"normalizer": replace({"String": "a"}, "b" * 65)}, "more than 64 times as long"),
        ({"normalizer": replace({"Regex": "."}, "b" * 65)}, "more than 64 times as long"),
        ({"decoder": replace({"String": "a"}, "b" * 65)}, "more than 64 times as long"),
        ({"normalizer": replace({"String": "a"}, "b" * 10_001)}, "10,001 characters, and 10,000 are the most"),
        ({"normalizer": replace({"String": ""}, "b")}, "replaces an empty text"),
        ({"normalizer": sequence(*101 * [{"type": "NFC"}])}, "102 steps, and 100 are the most"),
        ({"post_processor": 1}, "t.json is not a tokenizer.json that can be read"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}, "is not a tokenizer.json"),
    ],
)
def test_what_is_beyond_the_bounds_is_refused(parts, words):
    with pytest.raises(IntegrityError, match=words):
        opened(**parts)


def test_an_id_far_beyond_the_tokens_is_refused():
    require_dense({"a": 0, "b": 10_000}, "t.json")
    with pytest.raises(IntegrityError, match=r"t\.json has the token id 2147483648 and 2 tokens: expected ids up to"):
        require_dense({"a": 0, "b": 2**31}, "t.json")


def test_a_template_of_many_pieces_is_refused():
    piece = {"Sequence": {"id": "A", "type_id": 0}}
    processor = {"type": "TemplateProcessing", "single": [piece] * 1001, "pair": [piece], "special_tokens": {}}
    with pytest.raises(IntegrityError, match="pieces, and 1,000 are the most"):
        opened(post_processor=processor)


def test_a_panic_while_it_is_opened_is_a_sentence():
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    with pytest.raises(IntegrityError, match=r"is not a tokenizer\.json that can be read"):
        opened(model=model | {"continuing_subword_prefix": "########"})
    with pytest.raises(IntegrityError, match="100,000,000 are the most"):
        open_tokenizer(Tokenizer, bytes(100_000_001), "t.json")

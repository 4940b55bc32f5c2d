"""An untrusted tokenizer.json, within its bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pastkey.files.safetensors_header import HeaderError, StoredTensor, read_header

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import Tokenizer

from pastkey.errors import IntegrityError
from pastkey.files.tokenizer_file import open_tokenizer, require_dense

WHOLE: dict[str, Any] = json.loads(Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).to_str())


def opened(**parts: Any) -> Tokenizer:
    return open_tokenizer(Tokenizer, json.dumps(WHOLE | parts).encode(), "t.json")


def test_a_tokenizer_is_opened_without_cutting_and_padding():
    assert opened().encode("a").ids == [0]
    padding = {
        "strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "a",
    }  # fmt: skip
    assert opened(padding=padding).encode("a").ids == [0]


def test_what_the_library_does_not_take_is_refused():
    with pytest.raises(IntegrityError, match=r"t\.json is not a tokenizer\.json that can be read"):
        opened(post_processor=1)


def test_an_id_far_beyond_the_tokens_is_refused():
    require_dense({"a": 0, "b": 10_000}, "t.json")
    with pytest.raises(IntegrityError, match=r"t\.json has the token id 2147483648 and 2 tokens: expected ids up to"):
        require_dense({"a": 0, "b": 2**31}, "t.json")


def test_a_panic_while_it_is_opened_is_a_sentence():
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    with pytest.raises(IntegrityError, match=r"is not a tokenizer\.json that can be read"):
        opened(model=model | {"continuing_subword_prefix": "########"})
    with pytest.raises(IntegrityError, match="at most 100,000,000 are allowed"):
        open_tokenizer(Tokenizer, bytes(100_000_001), "t.json")


# --- what a safetensors header may say -----------------------------------------------------------------------------
HEADER: dict[str, Any] = {"__metadata__": {"a": "b"}, "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def written(file: Path, header: Any, data: bytes = bytes(24), length: int | None = None) -> Path:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(content) if length is None else length).to_bytes(8, "little") + content + data)
    return file


def test_a_header_is_read(tmp_path):
    found = read_header(written(tmp_path / "x", HEADER))
    assert found == {"w": StoredTensor("F32", (2, 3), 0, 24)}
    assert found["w"].elements == 6
    for dtype, size in {"F8_E4M3": 2, "BOOL": 2, "BF16": 4, "I64": 16, "F4": 1}.items():
        header = entry(dtype=dtype, shape=[2], data_offsets=[0, size])
        assert read_header(written(tmp_path / "x", header, bytes(size)))["w"].dtype == dtype


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": HEADER["w"] | changes}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{", "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b'{"w":' * 5000 + b"1", "is not JSON"),
        ({"w": 1}, "has no type"),
        (entry(dtype="float"), "has no type"),
        (entry(shape=[-1]), "has no shape"),
        (entry(shape=[1] * 100), "has no shape"),
        (entry(data_offsets=[0]), "has no place"),
        (entry(data_offsets=[24, 0]), "another number of bytes"),
        (entry(shape=[2**40]), "another number of bytes"),
        (entry(dtype="F9999999"), "another number of bytes"),
        (entry(data_offsets=[8, 32]), "overlap, or have a gap"),
        (entry() | {"v": entry()["w"]}, "overlap, or have a gap"),
        ({}, "its header says"),
    ],
)
def test_a_header_that_cannot_be_true_is_refused(header, words, tmp_path):
    with pytest.raises(HeaderError, match=words):
        read_header(written(tmp_path / "x", header))


def test_lengths_are_at_most_what_the_file_has(tmp_path):
    with pytest.raises(HeaderError, match="fewer than its header"):
        read_header(written(tmp_path / "x", HEADER, length=2**63))
    with (tmp_path / "x").open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    with pytest.raises(HeaderError, match="at most 100,000,000 are allowed"):
        read_header(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"123")
    with pytest.raises(HeaderError, match="it has 3 bytes"):
        read_header(tmp_path / "x")

"""What a safetensors header may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pastkey.files.safetensors_header import HeaderError, StoredTensor, read_header

WHOLE = {"__metadata__": {"a": "b"}, "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def written(file: Path, header: Any, data: bytes = bytes(24), length: int | None = None) -> Path:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(content) if length is None else length).to_bytes(8, "little") + content + data)
    return file


def test_a_header_is_read(tmp_path):
    found = read_header(written(tmp_path / "x", WHOLE))
    assert found == {"w": StoredTensor("F32", (2, 3), 0, 24)}
    assert found["w"].elements == 6
    types = {"F8_E4M3": 1, "BOOL": 1, "BF16": 2, "I64": 8, "F4": 0.5}
    for dtype, size in types.items():
        entry = {"dtype": dtype, "shape": [2], "data_offsets": [0, int(2 * size)]}
        assert read_header(written(tmp_path / "x", {"w": entry}, bytes(int(2 * size))))["w"].dtype == dtype


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{", "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b'{"w":' * 5000 + b"1", "is not JSON"),
        ({"w": 1}, "has no type"),
        (entry(dtype="float"), "has no type"),
        (entry(shape=[-1]), "has no shape"),
        (entry(shape=[True]), "has no shape"),
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
    with pytest.raises(HeaderError, match="its header says that it alone has"):
        read_header(written(tmp_path / "x", WHOLE, length=2**63))
    with (tmp_path / "x").open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    with pytest.raises(HeaderError, match="100,000,000 are the most"):
        read_header(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"123")
    with pytest.raises(HeaderError, match="it has 3 bytes"):
        read_header(tmp_path / "x")

"""Counts of a GGUF header, each at most what is left of the file."""

from __future__ import annotations

import struct

import pytest

from pastkey.errors import InputError
from pastkey.export.source.gguf_header import read_gguf

from .opening import write


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(pairs: list[bytes], tensors: list[bytes], version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs + tensors)
    return head + bytes(-len(head) % 32) + bytes(64)


LAYERS = text("llama.block_count") + struct.pack("<II", 4, 1)
TOKENS = text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc")
SCORES = text("scores") + struct.pack("<IIQ2f", 9, 6, 2, 0.0, 1.0)
TENSOR = text("w") + struct.pack("<IQQIQ", 2, 4, 2, 0, 32)


def test_a_header_is_read(tmp_path):
    file = write(tmp_path / "m.gguf", header([LAYERS, TOKENS, SCORES], [TENSOR]))
    (tensor,) = read_gguf(file)
    assert (tensor.name, tensor.elements, tensor.kind) == ("w", 8, 0)
    assert tensor.offset == file.stat().st_size - 64 + 32


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "does not begin with the letters GGUF"),
        (b"GGUF", "cut short or damaged"),
        (header([], [], version=1), "its version is 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0), "1,099,511,627,776 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40), "1,099,511,627,776 keys"),
        (header([text("a") + struct.pack("<IIQ", 9, 4, 2**40)], []), "1,099,511,627,776 values"),
        (header([text("a") + struct.pack("<IIQ", 9, 8, 2**60)], []), "values, and"),
        (header([text("a") + struct.pack("<IQ", 8, 2**62)], []), "bytes of a text"),
        (header([text("a") + struct.pack("<IIQIQ", 9, 9, 1, 9, 1)], []), "unknown type 9"),
        (header([text("a") + struct.pack("<I", 77)], []), "unknown type 77"),
        (header([LAYERS, LAYERS], [TENSOR]), "occurs twice"),
        (header([text("x.block_count") + struct.pack("<II", 4, 10**9)], [TENSOR]), "block_count is 1000000000"),
        (header([text("general.alignment") + struct.pack("<II", 4, 0)], []), "its alignment is 0"),
        (header([], [text("w") + struct.pack("<I", 2**31) + bytes(16)]), "2147483648 axes"),
    ],
)
def test_counts_beyond_the_file_are_refused_at_once(content, words, tmp_path):
    with pytest.raises(InputError, match=words):
        read_gguf(write(tmp_path / "m.gguf", content))

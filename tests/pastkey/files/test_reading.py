"""Untrusted files: those that are not regular, those that are too large, and a library's errors for damaged bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pastkey.errors import InputError, IntegrityError, MissingFileError, ResourceError
from pastkey.files import memory
from pastkey.files.folder import read_json, read_text
from pastkey.files.protobuf import BYTES, VARINT, DamagedError, fields, varint
from pastkey.files.reading import NativeError, is_panic, last_read, panics_as_errors, parse_json, read_bytes, reading


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_a_pipe_a_device_and_a_folder_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path / "pipe", "is a pipe, which can be read once"),
        (Path(os.devnull), "is a device, which may never end"),
        (tmp_path, "is a folder; a file was expected"),
        (tmp_path / "a\0b", "is not the name of a file"),
    ):
        with pytest.raises(InputError, match=words):
            read_text(path)
    with pytest.raises(MissingFileError, match="no such file"):
        read_text(tmp_path / "none" / "x")


def test_a_file_without_content_is_not_read_for_its_size(tmp_path):
    file = tmp_path / "large.json"
    with file.open("wb") as opened:
        opened.truncate(1 << 40)
    with pytest.raises(InputError, match="at most 100,000,000 are allowed"):
        read_json(file)
    with pytest.raises(OSError, match="of memory and"):
        read_text(file)
    assert last_read() == file
    file.write_bytes(b"12345")
    assert read_bytes(file, 5) == b"12345"
    with pytest.raises(IntegrityError, match=r"large\.json holds a JSON int"):
        read_json(file)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("1" * 5000, "4300 digits"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested more than 100 deep"),
        ("[" * 100_000, "nested more than 100 deep"),
        (r'{"a": ["x", "\ud800"]}', "half a surrogate pair"),
        (r'{"\uDfff": 1}', "half a surrogate pair"),
        ("{", "Expecting property name"),
        ('{"a": "\udcff"}', "not valid JSON"),
    ],
)
def test_json_that_later_code_could_not_take_is_refused(content, reason):
    with pytest.raises(IntegrityError, match=reason):
        parse_json(content.encode("utf-8", "surrogateescape"), "x.json")


def test_json_of_the_deepest_kind_and_whole_surrogate_pairs_are_read():
    assert parse_json(r'"\ud83d\ude42"', "x") == "🙂"
    assert str(parse_json("[" * 99 + "]" * 99, "x")).count("[") == 99


def test_what_a_parser_raises_is_a_sentence_with_the_file():
    with pytest.raises(IntegrityError, match=r"a\.bin cannot be read as numbers \(list index out of range\)"):  # noqa: SIM117
        with reading("a.bin", "numbers"):
            [][0]
    with pytest.raises(IntegrityError, match="cannot be read as a gzip file"), reading("a.gz", "a gzip file"):
        raise OSError("Not a gzipped file")  # no error of the system has no number
    for passed in (InputError("said"), FileNotFoundError(2, "x"), MemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(passed)), reading("a.bin", "numbers"):
            raise passed
    with pytest.raises(LookupError), reading("a.bin", "numbers", but=(LookupError,)):
        raise LookupError


def test_a_panic_is_caught_where_an_exception_is():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated")
    hostile = "a" * 40 + "b"
    with pytest.raises(BaseException) as caught:  # noqa: PT011 (the class is made in Rust)
        tokenizer.encode(hostile)
    assert is_panic(caught.value)
    with pytest.raises(NativeError), panics_as_errors():
        tokenizer.encode(hostile)
    with pytest.raises(IntegrityError, match="cannot be read as a text"), reading("t.json", "a text"):
        tokenizer.encode(hostile)


# --- memory ---------------------------------------------------------------------------------------------------------
def test_more_than_is_available_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    memory.require_memory_for("a.bin", 1000)
    with pytest.raises(ResourceError, match=r"reading a\.bin needs about 2\.0 GB of memory and 0 MB are available"):
        memory.require_memory_for("a.bin", 2 * 10**9)
    monkeypatch.setattr(memory, "available_memory", lambda: None)  # a system that does not say
    memory.require_memory_for("a.bin", 1 << 60)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the system does not say")
def test_available_memory_is_less_than_the_machine_has():
    (total,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    found = memory.available_memory()
    assert found is not None
    assert 0 < found <= int(total.split()[1]) << 10


# --- the fields of a message only by the wire format ----------------------------------------------------------------
def test_each_field_is_told_with_its_place():
    content = bytes([0x08, 0x96, 0x01, 0x12, 0x02]) + b"ab" + bytes([0x1D, 1, 0, 0, 0])
    found = list(fields(content, 0, len(content)))
    assert found == [(1, VARINT, 1, 3), (2, BYTES, 5, 7), (3, 5, 8, 12)]
    assert varint(content, 1) == (150, 3)
    assert content[5:7] == b"ab"


@pytest.mark.parametrize(
    "content",
    [bytes([0x12, 0x05, 0x61]), bytes([0x0B]), bytes([0x08, *[0x80] * 10, 0x01]), bytes([0x1D, 1, 0]), b"\x80"],
)
def test_what_is_no_message_is_damaged(content):
    with pytest.raises((DamagedError, IndexError)):
        list(fields(content, 0, len(content)))

"""Files become documents, one after another, and what is no data is refused in one sentence."""

from __future__ import annotations

import gzip
import os
import re

import pytest

from pastkey.errors import InputError, IntegrityError, MissingFileError, PastkeyError
from pastkey.train.data import sources
from pastkey.train.data.documents import Conversation
from pastkey.train.data.sources import open_corpus, survey

from .helpers import corpus_of, texts, write_lines


def test_a_folder_gives_its_text_files_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "c.txt").write_text("third\nline", encoding="utf-8")
    (tmp_path / "a.md").write_text("first", encoding="utf-8")
    (tmp_path / "b" / "x.TXT").write_text("second", encoding="utf-8")
    (tmp_path / "b" / "x.csv").write_text("not,text", encoding="utf-8")
    assert texts(open_corpus([tmp_path])) == ["first", "second", "third\nline"]
    write_lines(tmp_path / "b" / "2.jsonl", [{"text": "data"}])
    assert texts(open_corpus([tmp_path])) == ["data"]  # the others are its README


def test_the_end_token_separates_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\n<|endoftext|>\nthree\n<|endoftext|>\n".encode())
    assert texts(open_corpus([tmp_path / "a.txt"])) == ["one\r\ntwo", "three"]


CUT = gzip.compress(b'{"text": "a"}\n' * 1000)[:-20]
REFUSED: dict[str, tuple[str, bytes, type[PastkeyError], str]] = {
    "no text": ("a.txt", b" \n<|endoftext|>\n ", InputError, "a.txt is empty"),
    "behind a block": ("a.txt", b"one<|endoftext|>two \xe4", InputError, "a.txt is not UTF-8 text: byte 20 is 0xe4"),
    "JSON lines": ("a.jsonl", b"\n\n", InputError, "a.jsonl is empty: remove it"),
    "a byte": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe4"}\n', InputError, "line 2 is not UTF-8 text: byte 10"),
    "an array": ("a.jsonl", b'[\n{"text": "a"}\n]', InputError, "line 1 begins a JSON array; one object a line"),
    "cut JSON": ("a.jsonl", b'{"text": "a"}\n{"text": "b', IntegrityError, "a.jsonl, line 2 is not valid JSON"),
    "another field": (
        "a.jsonl",
        b'{"text": "a"}\n{"content": "b"}\n',
        InputError,
        "line 2 has the fields content; expected",
    ),
    "no gzip": ("a.jsonl.gz", b"no gzip", IntegrityError, "copy it again"),
    "cut gzip": ("a.jsonl.gz", CUT, IntegrityError, "copy it again"),
}


@pytest.mark.parametrize("spoilt", REFUSED)
def test_what_is_no_data_is_named_by_file_and_line(spoilt, tmp_path, monkeypatch):
    name, content, error, sentence = REFUSED[spoilt]
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 8)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=re.escape(sentence)):
        survey(open_corpus([tmp_path]))


def test_a_single_line_is_refused_unless_it_is_long():
    with pytest.raises(InputError, match="a single line of 11 bytes"):
        survey(corpus_of("hello world"))
    assert survey(corpus_of("hello world " * 1000)).documents == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_what_is_no_regular_file_and_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(MissingFileError, match="no such file or folder"):
        open_corpus([tmp_path / "none"])
    with pytest.raises(InputError, match=r"has no \.txt or \.md file"):
        open_corpus([tmp_path])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a pipe, which can be read once"):
        open_corpus([tmp_path / "pipe"])


def test_the_fingerprint_knows_documents_apart():
    one, two = survey(corpus_of("a\nb", "c")), survey(corpus_of("a\n", "bc"))
    assert one.fingerprint != two.fingerprint
    assert one == survey(corpus_of("a\nb", "c"))


# --- JSON lines and Parquet ---------------------------------------------------------------------------------------
ROWS = [{"text": "one\ntwo"}, {"text": "thr\u00e9e", "url": "x"}]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "ndjson", "jsonl.gz", "jsonl.zst", "parquet"])
def test_every_format_has_the_same_documents(suffix, tmp_path):
    file = write_lines(tmp_path / f"a.{suffix}", ROWS)
    lines = ("\ufeff" + file.read_text(encoding="utf-8") + "\n").encode()
    if suffix == "jsonl.gz":
        file.write_bytes(gzip.compress(lines))
    elif suffix == "jsonl.zst":
        file.write_bytes(pytest.importorskip("pyarrow").compress(lines, "zstd", asbytes=True))
    elif suffix == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(ROWS), file)
    else:
        file.write_bytes(lines)
    corpus = open_corpus([file])
    assert texts(corpus) == ["one\ntwo", "thr\u00e9e"]
    place = "row" if suffix == "parquet" else "line"
    assert [document.place for document in corpus.documents()] == [f"{file}, {place} 1", f"{file}, {place} 2"]


def test_parquet_has_conversations_without_the_fields_that_other_rows_have(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "c"}]
    rows = [{"messages": talk, "text": None}, {"messages": None, "text": "c"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [document.content for document in open_corpus([tmp_path]).documents()]
    assert found == [Conversation(talk), "c"]


def test_long_text_is_cut_at_lines_and_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_LONGEST_BYTES", 100)
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 7)
    lines = [f"line {number} \u00e9" for number in range(50)]
    text = "\n".join(lines) + "<|endoftext|>next<|endoftext|>" + "\u00e9" * 99
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = texts(open_corpus([tmp_path / "a.txt"]))
    assert max(len(text.encode()) for text in found) <= 107
    assert [line for text in found[:-3] for line in text.split("\n")] == lines
    assert found[-3] == "next"
    assert "".join(found[-2:]) == "\u00e9" * 99


# --- weights ------------------------------------------------------------------------------------------------------
def test_paths_may_have_weights(tmp_path):
    for name in ("a.txt", "b=2.txt", "c=3"):
        (tmp_path / name).write_text("text")
    found = open_corpus([f"{tmp_path}/a.txt=0.7", f"{tmp_path}/b=2.txt=0.3"])
    assert [source.weight for source in found.weighted] == [0.7, 0.3]
    assert found.name == "a.txt, b=2.txt"
    assert not open_corpus([tmp_path / "c=3"]).weighted  # a file of this name


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (["a.txt=1", "b.txt"], "--data b.txt has no weight and a.txt has: give one to each, or to none"),
        (["a.txt=0"], "the weight of --data a.txt=0 is 0; it must be a positive number"),
        (["a.txt=inf"], "it must be a positive number"),
        (["a.txt=much"], "no such file or folder: a.txt=much"),
        (["c.txt=1"], "no such file or folder: c.txt"),
    ],
)
def test_wrong_weights_are_refused(data, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    with pytest.raises((InputError, MissingFileError), match=re.escape(sentence)):
        open_corpus(data)

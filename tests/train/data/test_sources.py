"""Files become documents, one after another, and what is no data is refused in one sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pastkey.errors import InputError, MissingFileError
from pastkey.train.data.sources import open_corpus, survey

from .helpers import corpus_of, texts


def test_a_folder_gives_its_text_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "c.txt").write_text("third\nline", encoding="utf-8")
    (tmp_path / "a.md").write_text("first", encoding="utf-8")
    (tmp_path / "b" / "x.TXT").write_text("second", encoding="utf-8")
    (tmp_path / "b" / "x.csv").write_text("not,text", encoding="utf-8")
    assert texts(open_corpus([tmp_path])) == ["first", "second", "third\nline"]


def test_the_end_token_separates_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\n<|endoftext|>\nthree\n<|endoftext|>\n".encode())
    assert texts(open_corpus([tmp_path / "a.txt"])) == ["one\r\ntwo", "three"]


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("ein Kätzchen".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8 text: byte 5 is 0xe4"):
        survey(open_corpus([file]))


@pytest.mark.parametrize("content", ["", " \n\n ", "<|endoftext|>\n"])
def test_an_empty_corpus_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(InputError, match=r"a\.txt is empty"):
        survey(open_corpus([tmp_path / "a.txt"]))


def test_a_single_line_is_refused_unless_it_is_long() -> None:
    with pytest.raises(InputError, match="a single line of 11 bytes"):
        survey(corpus_of("hello world"))
    assert survey(corpus_of("hello world " * 1000)).documents == 1


def test_missing_paths_and_folders_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such file or folder"):
        open_corpus([tmp_path / "none"])
    with pytest.raises(InputError, match=r"has no \.txt or \.md file"):
        open_corpus([tmp_path])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_what_is_no_regular_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a pipe, which can be read once"):
        open_corpus([tmp_path / "pipe"])
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises(InputError, match="is a device, which need not end"):
            open_corpus([Path(device)])
    read, write = os.pipe()  # what <(command) gives
    try:
        with pytest.raises(InputError, match=f"/dev/fd/{read} is a pipe"):
            open_corpus([Path(f"/dev/fd/{read}")])
    finally:
        os.close(read)
        os.close(write)


def test_the_fingerprint_knows_documents_apart() -> None:
    one, two = survey(corpus_of("a\nb", "c")), survey(corpus_of("a\n", "bc"))
    assert one.fingerprint != two.fingerprint
    assert one == survey(corpus_of("a\nb", "c"))

"""Text becomes token files without loss, and batches come back the same."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from pastkey.errors import InputError, MissingFileError
from pastkey.train.checkpoint import TOKENS_TRAIN, TOKENS_VAL
from pastkey.train.data import (
    LESSON,
    Corpus,
    DataInfo,
    Tokens,
    survey,
    text_corpus,
    write_lesson,
    write_tokens,
)
from pastkey.train.tokenizer import TextTokenizer, lesson_tokenizer, train_bpe, train_char

from .helpers import write_corpus


def written(folder: Path, corpus: Corpus, context: int = 8, tokenizer: TextTokenizer | None = None) -> DataInfo:
    tokenizer = tokenizer or train_char(corpus.documents())
    return write_tokens(folder, corpus, survey(corpus), tokenizer, context)


def ids(folder: Path, name: str, info: DataInfo) -> list[int]:
    return [int(token) for token in np.fromfile(folder / name, info.dtype)]


def corpus_of(*documents: str) -> Corpus:
    return Corpus("test", lambda: iter(documents))


# --- reading ------------------------------------------------------------------------------------------------------
def test_a_folder_gives_its_text_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "c.txt").write_text("third\nline", encoding="utf-8")
    (tmp_path / "a.md").write_text("first", encoding="utf-8")
    (tmp_path / "b" / "x.TXT").write_text("second", encoding="utf-8")
    (tmp_path / "b" / "x.csv").write_text("not,text", encoding="utf-8")
    assert list(text_corpus([tmp_path]).documents()) == ["first", "second", "third\nline"]


def test_the_end_token_separates_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\n<|endoftext|>\nthree\n<|endoftext|>\n".encode())
    assert list(text_corpus([tmp_path / "a.txt"]).documents()) == ["one\r\ntwo", "three"]


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("ein Kätzchen".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8 text: byte 5 is 0xe4"):
        survey(text_corpus([file]))


@pytest.mark.parametrize("content", ["", " \n\n ", "<|endoftext|>\n"])
def test_an_empty_corpus_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(InputError, match=r"a\.txt is empty"):
        survey(text_corpus([tmp_path / "a.txt"]))


def test_a_single_line_is_refused_unless_it_is_long() -> None:
    with pytest.raises(InputError, match="a single line of 11 bytes"):
        survey(corpus_of("hello world"))
    assert survey(corpus_of("hello world " * 1000)).documents == 1


def test_missing_paths_and_folders_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such file or folder"):
        text_corpus([tmp_path / "none"])
    with pytest.raises(InputError, match=r"has no \.txt or \.md file"):
        text_corpus([tmp_path])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_what_is_no_regular_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a pipe, which can be read once"):
        text_corpus([tmp_path / "pipe"])
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises(InputError, match="is a device, which need not end"):
            text_corpus([Path(device)])
    read, write = os.pipe()  # what <(command) gives
    try:
        with pytest.raises(InputError, match=f"/dev/fd/{read} is a pipe"):
            text_corpus([Path(f"/dev/fd/{read}")])
    finally:
        os.close(read)
        os.close(write)


def test_the_fingerprint_knows_documents_apart() -> None:
    one, two = survey(corpus_of("a\nb", "c")), survey(corpus_of("a\n", "bc"))
    assert one.fingerprint != two.fingerprint
    assert one == survey(corpus_of("a\nb", "c"))


# --- token files --------------------------------------------------------------------------------------------------
def test_every_document_is_in_one_of_the_files_between_end_tokens(tmp_path: Path) -> None:
    documents = [f"document {number}\nof many" for number in range(45)]
    corpus = corpus_of(*documents)
    tokenizer = train_bpe(documents, 300)
    info = written(tmp_path, corpus, tokenizer=tokenizer)
    found: list[str] = []
    for name, count in ((TOKENS_TRAIN, info.train_tokens), (TOKENS_VAL, info.val_tokens)):
        tokens = ids(tmp_path, name, info)
        assert len(tokens) == count
        assert tokens[0] == tokens[-1] == tokenizer.end
        text = tokenizer.tokenizer.decode(tokens, skip_special_tokens=False)
        found += text.split("<|endoftext|>")[1:-1]
    assert sorted(found) == sorted(documents)
    held_out = documents[19::20]
    assert found[-2:] == held_out
    assert info.val_bytes == sum(len(text) for text in held_out)


def test_the_tail_of_a_single_document_is_held_out(tmp_path: Path) -> None:
    corpus = text_corpus([write_corpus(tmp_path / "a.txt")])
    tokenizer = train_char(corpus.documents())
    info = written(tmp_path, corpus, tokenizer=tokenizer)
    train, val = (tokenizer.decode(ids(tmp_path, name, info)) for name in (TOKENS_TRAIN, TOKENS_VAL))
    assert train + val == next(corpus.documents())
    assert 0.08 < len(val) / len(train + val) < 0.12
    assert info.val_bytes == len(val.encode())


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    characters = "".join(chr(0x3400 + number) for number in range(70_000) if not 0xD800 <= 0x3400 + number < 0xE000)
    assert written(tmp_path, corpus_of("\n" + characters)).dtype == "<u4"
    assert written(tmp_path, corpus_of("\n" + characters[:500] * 10)).dtype == "<u2"


def test_too_little_text_for_the_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one window of the context takes 129"):
        written(tmp_path, corpus_of("a line\nand another line\n"), context=128)


# --- batches ------------------------------------------------------------------------------------------------------
def test_targets_are_the_inputs_one_token_later(tmp_path: Path) -> None:
    info = written(tmp_path, text_corpus([write_corpus(tmp_path / "a.txt")]))
    tokens = Tokens(tmp_path / TOKENS_TRAIN, info, 8)
    inputs, targets = tokens.draw(5, seed=1, step=3)
    assert inputs.shape == targets.shape == (5, 8)
    assert inputs[:, 1:].equal(targets[:, :-1])


def test_a_step_draws_the_same_batch_whatever_came_before(tmp_path: Path) -> None:
    info = written(tmp_path, text_corpus([write_corpus(tmp_path / "a.txt")]))
    one, two = (Tokens(tmp_path / TOKENS_TRAIN, info, 8) for _ in range(2))
    one.draw(4, seed=1, step=0)
    assert one.draw(4, seed=1, step=7)[0].equal(two.draw(4, seed=1, step=7)[0])
    assert not one.draw(4, seed=1, step=7)[0].equal(one.draw(4, seed=1, step=8)[0])
    assert not one.draw(4, seed=1, step=7)[0].equal(one.draw(4, seed=2, step=7)[0])


def test_short_documents_are_read_from_their_beginning(tmp_path: Path) -> None:
    info = written(tmp_path, corpus_of(*("abc\n" + "d" * number for number in range(40))), context=60)
    inputs, _ = Tokens(tmp_path / TOKENS_TRAIN, info, 60).draw(50, seed=0, step=0)
    assert (inputs[:, 0] == info.begin).all()  # type: ignore[attr-defined]
    assert len({tuple(row) for row in inputs.tolist()}) > 10


def test_long_documents_are_read_from_anywhere(tmp_path: Path) -> None:
    info = written(tmp_path, corpus_of("\n".join(map(str, range(10_000)))))
    inputs, _ = Tokens(tmp_path / TOKENS_TRAIN, info, 8).draw(200, seed=0, step=0)
    assert len({tuple(row) for row in inputs.tolist()}) > 190


def test_without_a_begin_token_documents_start_after_the_end_token(tmp_path: Path) -> None:
    documents = [f"{number}\nx" for number in range(100, 140)]
    tokenizer = dataclasses.replace(train_char(documents), begin=None)
    info = written(tmp_path, corpus_of(*documents), 12, tokenizer)
    inputs, _ = Tokens(tmp_path / TOKENS_TRAIN, info, 12).draw(50, seed=0, step=0)
    assert {int(row[5]) for row in inputs} == {tokenizer.end}  # five characters, then the EOS token


@pytest.mark.parametrize("size", [1, 3, 100])
def test_validation_reads_every_token_once(size: int, tmp_path: Path) -> None:
    info = written(tmp_path, text_corpus([write_corpus(tmp_path / "a.txt")]), context=13)
    targets = [
        token
        for _, batch in Tokens(tmp_path / TOKENS_VAL, info, 13).windows(size)
        for token in batch.flatten().tolist()
    ]
    assert targets == ids(tmp_path, TOKENS_VAL, info)[1:]


def test_the_lesson_is_one_batch_of_whole_sentences(tmp_path: Path) -> None:
    tokenizer = lesson_tokenizer()
    info = write_lesson(tmp_path, tokenizer)
    tokens = Tokens(tmp_path / TOKENS_TRAIN, info, 8)
    inputs, targets = tokens.draw(16, seed=0, step=0)
    rows = [[*row, int(last)] for row, last in zip(inputs.tolist(), targets[:, -1], strict=True)]
    assert [tokenizer.tokenizer.decode(row, skip_special_tokens=False) for row in rows] == list(LESSON)
    assert [batch[0].equal(inputs) for batch in tokens.windows(1)] == [True]

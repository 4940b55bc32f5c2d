"""A corpus is tokenized a batch of documents at a time, with the place of what cannot be, and by source."""

from __future__ import annotations

from pathlib import Path

import pytest

from pastkey.errors import InputError
from pastkey.train.checkpoint import TOKENS_TRAIN
from pastkey.train.data import tokenizing
from pastkey.train.data.sources import open_corpus, survey
from pastkey.train.data.tokenizing import write_tokens
from pastkey.train.tokenizer import train_char

from .helpers import corpus_of, ids, write_lines, written


@pytest.mark.parametrize("rows", ["text", "examples"])
def test_the_size_of_a_batch_changes_nothing(rows, tmp_path, monkeypatch):
    documents = [{"text": f"document {number}\n" + "x" * (number % 7)} for number in range(50)]
    pairs = [{"prompt": "a", "completion": "b"}] if rows == "examples" else []
    corpus = corpus_of(*documents, *pairs)
    contents = []
    for size in (1, 100, 10**6):
        monkeypatch.setattr(tokenizing, "_BATCH_CHARACTERS", size)
        info = written(tmp_path, corpus)
        contents.append((info, ids(tmp_path, TOKENS_TRAIN, info)))
    assert contents[0] == contents[1] == contents[2]


def test_progress_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tokenizing, "_SAID_EVERY", 0.0)
    written(tmp_path, corpus_of(*["some text\n" * 100] * 30))
    assert "tokenizing: 0 of 0 MB" in capsys.readouterr().err


def test_weighted_sources_lie_one_after_another_and_each_has_held_out_text(tmp_path):
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [{"text": name * 10}] * 40)
    corpus = open_corpus([f"{tmp_path}/a.jsonl=3", f"{tmp_path}/b.jsonl=1"])
    tokenizer = train_char(["ab\n"])
    info = write_tokens(tmp_path, corpus, survey(corpus), tokenizer, 8)
    assert [(Path(source.name).name, source.weight) for source in info.sources] == [("a.jsonl", 3.0), ("b.jsonl", 1.0)]
    tokens = ids(tmp_path, TOKENS_TRAIN, info)
    cut = info.sources[0].tokens
    assert set(tokenizer.decode(tokens[:cut])) == {"a"}
    assert set(tokenizer.decode(tokens[cut:])) == {"b"}
    assert info.val_tokens == 4 * 11 + 1


def test_a_weighted_source_fills_a_window(tmp_path):
    for name, length in (("a", 90), ("b", 9)):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": name * length}] * 40)
    corpus = open_corpus([f"{tmp_path}/a.jsonl=3", f"{tmp_path}/b.jsonl=1"])
    with pytest.raises(InputError, match=r"b\.jsonl has only 381 tokens to train on, and one window .* takes 401"):
        write_tokens(tmp_path, corpus, survey(corpus), train_char(["ab"]), 400)


def test_a_tokenizer_of_another_text_is_told_with_file_and_line(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "the cat"}, {"text": "the dog"}])
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: the text has a word or character that the tokenizer does"):
        written(tmp_path, open_corpus([file]), tokenizer=train_char(["the cat"]))


def test_a_file_that_changes_meanwhile_is_told(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "the cat\n" * 9}] * 3)
    corpus = open_corpus([file])
    found = survey(corpus)
    write_lines(file, [{"text": "the cat\n" * 9}] * 4)
    with pytest.raises(InputError, match=r"a\.jsonl changed while it was read"):
        write_tokens(tmp_path, corpus, found, train_char(["the cat\n"]), 8)

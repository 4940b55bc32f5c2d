"""Text becomes token files without loss."""

from __future__ import annotations

import pytest

from pastkey.errors import InputError
from pastkey.train.checkpoint import TOKENS_TRAIN, TOKENS_VAL
from pastkey.train.data.sources import open_corpus
from pastkey.train.tokenizer import train_bpe, train_char

from ..helpers import write_corpus
from .helpers import corpus_of, ids, texts, written


def test_every_document_is_in_one_of_the_files_between_end_tokens(tmp_path):
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


def test_the_tail_of_a_single_document_is_held_out(tmp_path):
    corpus = open_corpus([write_corpus(tmp_path / "a.txt")])
    tokenizer = train_char(texts(corpus))
    info = written(tmp_path, corpus, tokenizer=tokenizer)
    train, val = (tokenizer.decode(ids(tmp_path, name, info)) for name in (TOKENS_TRAIN, TOKENS_VAL))
    assert train + val == texts(corpus)[0]
    assert 0.08 < len(val) / len(train + val) < 0.12
    assert info.val_bytes == len(val.encode())


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    characters = "".join(chr(0x3400 + number) for number in range(70_000) if not 0xD800 <= 0x3400 + number < 0xE000)
    assert written(tmp_path, corpus_of("\n" + characters)).dtype == "<u4"
    assert written(tmp_path, corpus_of("\n" + characters[:500] * 10)).dtype == "<u2"


def test_too_little_text_for_the_context_is_refused(tmp_path):
    with pytest.raises(InputError, match="one window of the context takes 129"):
        written(tmp_path, corpus_of("a line\nand another line\n"), context=128)

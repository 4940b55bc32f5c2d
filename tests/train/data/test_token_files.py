"""Text becomes token files without loss."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from pastkey.errors import InputError
from pastkey.train.checkpoint import TOKENS_TRAIN, TOKENS_VAL
from pastkey.train.data import packing, tokenizing
from pastkey.train.data.packing import Packer
from pastkey.train.data.sources import open_corpus, survey
from pastkey.train.data.token_files import DataInfo
from pastkey.train.data.tokenizing import write_tokens
from pastkey.train.tokenizer import train_bpe, train_char

from ..helpers import write_corpus
from .helpers import CHATML, chat, chat_tokenizer, corpus_of, ids, texts, weighted, write_lines, written


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
    tokenizer = train_bpe(["the cat"], 260)
    assert written(tmp_path, corpus_of(*PAIRS), 30, tokenizer).dtype == "<i2"
    tokenizer.tokenizer.add_tokens([f"[{number}]" for number in range(33_000)])
    info = written(tmp_path, corpus_of(*PAIRS), 30, tokenizer)  # one bit says whether a token is trained
    assert info.dtype == "<i4"
    assert tokenizer.end in rows(tmp_path, TOKENS_TRAIN, info)[0]


def test_too_little_text_for_the_context_is_refused(tmp_path):
    with pytest.raises(InputError, match="one window of the context has 129"):
        written(tmp_path, corpus_of("a line\nand another line\n"), context=128)


# --- a corpus is tokenized a batch of documents at a time, with the place of what cannot be, and by source ---------
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
    corpus = weighted(tmp_path, a=[{"text": "a" * 10}] * 40, b=[{"text": "b" * 10}] * 40)
    tokenizer = train_char(["ab\n"])
    info = written(tmp_path, corpus, 8, tokenizer)
    assert [(Path(source.name).name, source.weight) for source in info.sources] == [("a.jsonl", 3.0), ("b.jsonl", 1.0)]
    tokens, cut = ids(tmp_path, TOKENS_TRAIN, info), info.sources[0].tokens
    assert (set(tokenizer.decode(tokens[:cut])), set(tokenizer.decode(tokens[cut:]))) == ({"a"}, {"b"})
    assert info.val_tokens == 4 * 11 + 1
    with pytest.raises(InputError, match=r"a\.jsonl has only 418 tokens to train on, and one window .* has 421"):
        written(tmp_path, corpus, 420, tokenizer)


def test_a_tokenizer_of_another_text_is_told_with_file_and_line(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "the cat"}, {"text": "the dog"}])
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: the text has a word or character that the tokenizer does"):
        written(tmp_path, open_corpus([file]), tokenizer=train_char(["the cat"]))


def test_a_file_that_changes_meanwhile_is_told(tmp_path):
    rows = [{"text": "the cat\n" * 9}] * 3
    corpus = open_corpus([write_lines(tmp_path / "a.jsonl", rows)])
    found = survey(corpus)
    write_lines(tmp_path / "a.jsonl", rows * 2)
    with pytest.raises(InputError, match=r"a\.jsonl changed while it was read"):
        write_tokens(tmp_path, corpus, found, train_char(["the cat\n"]), 8)


# --- token files of examples hold which tokens are trained, and data that would train nothing is refused -----------
PAIRS = [{"prompt": f"the cat {number}", "completion": " sat"} for number in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the cat sat on the mat 0123456789"], 280)


def rows(folder: Path, name: str, info: DataInfo) -> list[list[int]]:
    assert info.row_length
    found: list[list[int]] = np.fromfile(folder / name, info.dtype).reshape(-1, info.row_length).tolist()
    return found


def trained_of(folder: Path, name: str, info: DataInfo) -> list[int]:
    return [token for row in rows(folder, name, info) for token in row if token >= 0]


def test_completions_are_trained_and_prompts_and_padding_are_not(tokenizer, tmp_path):
    info = written(tmp_path, corpus_of(*PAIRS), 30, tokenizer)
    assert info.masked
    assert info.row_length == 31
    answer = [*tokenizer.encode(" sat"), tokenizer.end]
    found = rows(tmp_path, TOKENS_TRAIN, info)
    assert trained_of(tmp_path, TOKENS_TRAIN, info) == answer * 38
    assert info.trained_tokens == len(answer * 38)
    assert info.train_tokens == len(found) * 31
    first = [token if token >= 0 else ~token for token in found[0][: info.first_example]]
    assert tokenizer.tokenizer.decode(first, skip_special_tokens=False).startswith("<|endoftext|>the cat ")
    assert first[-1] == tokenizer.end
    assert trained_of(tmp_path, TOKENS_VAL, info) == answer * 2  # of 40
    assert info.val_bytes == 2 * len(" sat")


def test_of_few_examples_the_first_is_held_out_and_one_alone_is_in_both(tokenizer, tmp_path):
    info = written(tmp_path, corpus_of(*PAIRS[:3]), 12, tokenizer)
    assert (info.train_tokens // 13, info.val_tokens // 13) == (2, 1)
    info = written(tmp_path, corpus_of({"text": "the cat"}, *PAIRS[:2]), 12, tokenizer)
    held_out = [~token if token < 0 else token for token in rows(tmp_path, TOKENS_VAL, info)[0]]
    assert tokenizer.decode(held_out) == "the cat 0 sat"
    info = written(tmp_path, corpus_of(PAIRS[0]), 12, tokenizer)
    assert rows(tmp_path, TOKENS_TRAIN, info) == rows(tmp_path, TOKENS_VAL, info)


def test_text_beside_examples_goes_into_as_many_windows_as_it_needs(tokenizer, tmp_path):
    text = "the cat sat on the mat " * 10
    info = written(tmp_path, corpus_of({"text": text}, *PAIRS[:2]), 12, tokenizer)
    trained = trained_of(tmp_path, TOKENS_TRAIN, info)
    assert len(trained) == len(tokenizer.encode(text)) + 1 + len(tokenizer.encode(" sat")) + 1
    assert info.cut == 0


def test_an_example_longer_than_a_window_loses_its_end_and_is_counted(tokenizer, tmp_path):
    long = {"prompt": "the cat", "completion": " sat on the mat" * 20}
    info = written(tmp_path, corpus_of(long, *PAIRS[:2]), 12, tokenizer)
    assert info.cut == 1
    assert info.train_tokens == 2 * 13


NO_END = CHATML.replace("<|im_end|>", "")


@pytest.mark.parametrize(
    ("template", "row", "sentence"),
    [
        (CHATML, chat("hi"), "no token of test would be trained: no conversation has an assistant's turn"),
        (NO_END, chat("hi", "hello"), "no end-of-turn token of test would be trained, so that answers would never end"),
        (CHATML, chat("hi", "hello " * 99), "no end-of-turn token .*3 examples are longer than the context of 64"),
        (CHATML, chat("hi " * 99, "hello"), "no token of test .*3 examples are longer than the context of 64 tokens"),
    ],
)
def test_data_that_trains_no_answer_or_no_end_is_refused(template, row, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        written(tmp_path, corpus_of(row, row, row), 64, chat_tokenizer(template))


def test_conversations_and_no_texts_beside_them_say_what_ends_generation(tmp_path):
    tokenizer = chat_tokenizer()
    rows = [chat("hi", "hello"), {"text": "hello"}, {"prompt": "hi", "completion": " hello"}] * 10
    info = written(tmp_path, corpus_of(*rows), 64, tokenizer)
    assert tokenizer.tokenizer.id_to_token(info.end) == "<|im_end|>"
    info = written(tmp_path, corpus_of(*rows[1:3] * 10), 64, tokenizer)
    assert info.end == tokenizer.end


@pytest.mark.parametrize("count", [4, 25])
def test_what_is_held_out_trains_something(count, tokenizer, tmp_path):
    long = {"prompt": "the cat " * 20, "completion": " sat"}
    rows = [dict(pair) for pair in PAIRS[:count]]
    rows[0] = rows[min(19, count - 2)] = long
    info = written(tmp_path, corpus_of(*rows), 24, tokenizer)
    assert info.val_bytes >= len(" sat")


# --- examples go whole into windows, each once, and little space is left over --------------------------------------
def packed(examples: list[list[int]], length: int) -> tuple[list[list[int]], Packer]:
    file = io.BytesIO()
    packer = Packer(file, length, -1, "<i2")
    for example in examples:
        packer.add(np.array(example, np.int64))
    packer.finish()
    return np.frombuffer(file.getvalue(), "<i2").reshape(-1, length).tolist(), packer


def test_an_example_goes_where_the_least_space_is_left():
    rows, packer = packed([[1] * 6, [2] * 7, [3] * 3, [4] * 4], 10)
    assert sorted(rows) == [[1] * 6 + [4] * 4, [2] * 7 + [3] * 3]
    assert packer.windows == 2
    assert packer.first == 7


@pytest.mark.parametrize("most_open", [1, 4, 512])
def test_every_example_is_whole_in_one_window(most_open, monkeypatch):
    monkeypatch.setattr(packing, "_OPEN", most_open)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 33, 500)
    rows, packer = packed([[number] * int(length) for number, length in enumerate(lengths)], 32)
    found = [[token for token in row if token >= 0] for row in rows]
    counts = [{token: row.count(token) for token in dict.fromkeys(row)} for row in found]
    assert sorted((token, count) for row in counts for token, count in row.items()) == list(enumerate(lengths))
    assert packer.windows == len(rows)
    assert rows[0][: packer.first] == [rows[0][0]] * packer.first
    if most_open == 512:
        assert sum(map(len, found)) > 0.9 * 32 * len(rows)

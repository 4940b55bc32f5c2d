"""Token files of examples hold which tokens are trained, and data that would train nothing is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pastkey.errors import InputError
from pastkey.train.checkpoint import TOKENS_TRAIN, TOKENS_VAL
from pastkey.train.data.token_files import DataInfo
from pastkey.train.tokenizer import train_bpe

from .helpers import CHATML, MARKED, chat, chat_tokenizer, corpus_of, written

PAIRS = [{"prompt": f"the cat {number}", "completion": " sat"} for number in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the cat sat on the mat 0123456789"], 280)


def rows(folder: Path, name: str, info: DataInfo) -> list[list[int]]:
    assert info.row_length
    found: list[list[int]] = np.fromfile(folder / name, info.dtype).reshape(-1, info.row_length).tolist()
    return found


def test_completions_are_trained_and_prompts_and_padding_are_not(tokenizer, tmp_path):
    info = written(tmp_path, corpus_of(*PAIRS), 30, tokenizer)
    assert info.masked
    assert info.row_length == 31
    answer = [*tokenizer.encode(" sat"), tokenizer.end]
    found = rows(tmp_path, TOKENS_TRAIN, info)
    trained = [token for row in found for token in row if token >= 0]
    assert trained == answer * 38
    assert info.trained_tokens == len(trained)
    assert info.train_tokens == len(found) * 31
    first = [token if token >= 0 else ~token for token in found[0][: info.first_example]]
    assert tokenizer.tokenizer.decode(first, skip_special_tokens=False).startswith("<|endoftext|>the cat ")
    assert first[-1] == tokenizer.end
    held_out = [token for row in rows(tmp_path, TOKENS_VAL, info) for token in row if token >= 0]
    assert held_out == answer * 2  # of 40
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
    trained = [token for row in rows(tmp_path, TOKENS_TRAIN, info) for token in row if token >= 0]
    assert len(trained) == len(tokenizer.encode(text)) + 1 + len(tokenizer.encode(" sat")) + 1
    assert info.cut == 0


def test_an_example_longer_than_a_window_loses_its_end_and_is_counted(tokenizer, tmp_path):
    long = {"prompt": "the cat", "completion": " sat on the mat" * 20}
    info = written(tmp_path, corpus_of(long, *PAIRS[:2]), 12, tokenizer)
    assert info.cut == 1
    assert info.train_tokens == 2 * 13


def test_a_large_vocabulary_takes_four_bytes(tokenizer, tmp_path):
    assert written(tmp_path, corpus_of(*PAIRS), 12, tokenizer).dtype == "<i2"
    tokenizer = train_bpe(["the cat"], 260)
    tokenizer.tokenizer.add_tokens([f"[{number}]" for number in range(33_000)])
    info = written(tmp_path, corpus_of(*PAIRS), 30, tokenizer)
    assert info.dtype == "<i4"
    assert tokenizer.end in rows(tmp_path, TOKENS_TRAIN, info)[0]


NO_END = CHATML.replace("<|im_end|>", "")
OUTSIDE = MARKED.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}")


@pytest.mark.parametrize(
    ("template", "row", "sentence"),
    [
        (CHATML, chat("hi"), "no token of test would be trained: no conversation has an assistant's turn"),
        ("{{ messages[0]['content'] }}", chat("hi", "hello"), "no token of test would be trained"),
        (NO_END, chat("hi", "hello"), "no end-of-turn token of test would be trained, so that answers would never end"),
        (OUTSIDE, chat("hi", "hello"), "no end-of-turn token of test"),
        (CHATML, chat("hi", "hello " * 99), "no end-of-turn token .*3 examples are longer than the context of 64"),
        (CHATML, chat("hi " * 99, "hello"), "no token of test .*3 examples are longer than the context of 64 tokens"),
    ],
)
def test_data_that_trains_no_answer_or_no_end_is_refused(template, row, sentence, tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match=sentence):
        written(tmp_path, corpus_of(row, row, row), 64, chat_tokenizer(template))


def test_the_end_of_a_turn_becomes_the_end_of_generation(tmp_path):
    pytest.importorskip("transformers")
    tokenizer = chat_tokenizer()
    info = written(tmp_path, corpus_of(*[chat("hi", "hello")] * 30), 64, tokenizer)
    assert tokenizer.tokenizer.id_to_token(tokenizer.end) == "<|endoftext|>"
    assert tokenizer.tokenizer.id_to_token(info.end) == "<|im_end|>"


def test_conversations_and_no_texts_beside_them_say_what_ends_generation(tmp_path):
    pytest.importorskip("transformers")
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

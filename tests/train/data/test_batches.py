"""Batches come back the same, and hold what the token files hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pastkey.train.checkpoint import TOKENS_TRAIN, TOKENS_VAL
from pastkey.train.data.batches import NOT_TRAINED, Batch, Tokens, in_parts
from pastkey.train.data.sources import open_corpus
from pastkey.train.tokenizer import TextTokenizer, train_char

from ..helpers import write_corpus
from .helpers import corpus_of, ids, weighted, written


def drawn(folder: Path, documents: Sequence[str], context: int, rows: int, tokenizer: TextTokenizer) -> list[Any]:
    """The rows of the first step's batch, each with its targets."""
    info = written(folder, corpus_of(*documents), context, tokenizer)
    batch = Tokens(folder / TOKENS_TRAIN, info, context).draw(rows, seed=0, step=0)
    return [*zip(*(part.tolist() for part in batch), strict=True)]


def test_a_step_draws_the_same_batch_whatever_came_before(tmp_path):
    info = written(tmp_path, open_corpus([write_corpus(tmp_path / "a.txt")]))
    one, two = (Tokens(tmp_path / TOKENS_TRAIN, info, 8) for _ in range(2))
    one.draw(4, seed=1, step=0)
    assert one.draw(4, seed=1, step=7)[0].equal(two.draw(4, seed=1, step=7)[0])
    assert not one.draw(4, seed=1, step=7)[0].equal(one.draw(4, seed=1, step=8)[0])
    assert not one.draw(4, seed=1, step=7)[0].equal(one.draw(4, seed=2, step=7)[0])


@pytest.mark.parametrize("ends", ["of both sides", "without a begin", "with another end"])
def test_a_window_begins_and_ends_with_its_document(ends, tmp_path):
    documents = [f"{number}\n" + "d" * (number % 60) for number in range(100, 300)]
    tokenizer = train_char(documents)
    if ends == "without a begin":  # the end of the document before it is there
        tokenizer = dataclasses.replace(tokenizer, begin=None)
    elif ends == "with another end":  # as that of a turn, which may be in a text
        tokenizer = dataclasses.replace(tokenizer, end=tokenizer.encode("\n")[0])
    begins, whole = set[int](), 0
    for row, wanted in drawn(tmp_path, documents, 40, 200, tokenizer):
        trained = [token for token in wanted if token != NOT_TRAINED]
        assert wanted[: len(trained)] == trained  # padding is at the end
        assert row[1 : len(trained)] == trained[:-1]
        assert trained[-1] == tokenizer.end or len(trained) == 40
        if len(trained) < 40:
            whole += 1
            begins.add(row[0])
            assert trained.count(tokenizer.end) == (2 if ends == "with another end" else 1)
    assert whole > 20
    assert (tokenizer.end if tokenizer.begin is None else tokenizer.begin) in begins
    assert len(begins) <= 2  # without one the first document has none before it


def test_every_token_of_the_corpus_is_drawn(tmp_path):
    documents = ["abc", "def", "ghijklmnopqrstuvwxyz", "0123456789", "one\nmore"]
    rows = drawn(tmp_path, documents, 8, 500, train_char(documents))
    every = np.fromfile(tmp_path / TOKENS_TRAIN, "<u2").tolist()
    assert {token for _, targets in rows for token in targets} == {*every, NOT_TRAINED}


def test_tokens_of_short_and_long_documents_are_as_likely(tmp_path):
    documents = ["a" * 9] * 300 + ["b" * 199] * 15
    rows = drawn(tmp_path, documents, 200, 800, train_char(documents))
    drawn_tokens = [token for _, targets in rows for token in targets]
    every = np.fromfile(tmp_path / TOKENS_TRAIN, "<u2").tolist()
    a, b = every[1], every[-2]
    assert drawn_tokens.count(a) / drawn_tokens.count(b) == pytest.approx(every.count(a) / every.count(b), rel=0.2)


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("begin", [True, False])
def test_validation_reads_every_token_once(size, begin, tmp_path):
    documents = [f"{number}\n" + "ab" * number for number in range(200)]
    tokenizer = train_char(documents)
    tokenizer = tokenizer if begin else dataclasses.replace(tokenizer, begin=None)
    info = written(tmp_path, corpus_of(*documents), 13, tokenizer)
    batches = [*Tokens(tmp_path / TOKENS_VAL, info, 13).windows(size)]
    targets = [token for _, batch in batches for token in batch.flatten().tolist() if token != NOT_TRAINED]
    found = ids(tmp_path, TOKENS_VAL, info)
    assert max(len(batch) for batch, _ in batches) == min(size, sum(len(batch) for batch, _ in batches))
    assert targets == found[1:]


# --- examples and weights -----------------------------------------------------------------------------------------
PAIRS = [{"prompt": f"{number:03}", "completion": "ab"} for number in range(100)]
DIGITS = train_char(["0123456789ab"])


def example_tokens(folder: Path) -> Tokens:
    info = written(folder, corpus_of(*PAIRS), 6, DIGITS)  # one example a row, of seven tokens
    return Tokens(folder / TOKENS_TRAIN, info, 6)


def test_targets_that_are_not_trained_are_left_out(tmp_path):
    tokens = example_tokens(tmp_path)
    assert tokens.first_prompt() == DIGITS.prompt("001")  # the first row is held out
    inputs, targets = tokens.draw(3, seed=0, step=0)
    assert inputs.shape == targets.shape == (3, 6)
    assert inputs.min() >= 0
    assert (targets[:, :3] == NOT_TRAINED).all()  # the prompt
    assert targets[:, 3:5].equal(inputs[:, 4:])
    assert (targets[:, 5] == 0).all()  # the EOS token
    batches = [*Tokens(tmp_path / TOKENS_VAL, written(tmp_path, corpus_of(*PAIRS), 6), 6).windows(2)]
    assert [tuple(targets.shape) for _, targets in batches] == [(2, 6), (2, 6), (1, 6)]
    assert sum(int((targets != NOT_TRAINED).sum()) for _, targets in batches) == 5 * 3


def test_every_row_is_drawn_once_in_an_epoch_in_an_order_of_its_own(tmp_path):
    tokens = example_tokens(tmp_path)
    rows = [tuple(row) for step in range(38) for row in tokens.draw(5, 0, step)[0].tolist()]
    epochs = rows[:95], rows[95:]
    assert len(set(epochs[0])) == 95
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]
    assert tokens.draw(5, 0, 7)[0].equal(example_tokens(tmp_path).draw(5, 0, 7)[0])


@pytest.mark.parametrize("form", ["text", "examples"])
def test_sources_are_drawn_by_their_weights(form, tmp_path):
    def row(name: str) -> dict[str, str]:
        return {"text": name * 9 + "\n"} if form == "text" else {"prompt": name, "completion": name}

    tokenizer = train_char(["ab\n"])
    info = written(tmp_path, weighted(tmp_path, a=[row("a")] * 40, b=[row("b")] * 400), 9, tokenizer)
    tokens = Tokens(tmp_path / TOKENS_TRAIN, info, 9)
    rows = [row for step in range(50) for row in tokens.draw(8, seed=0, step=step)[0].tolist()]
    share = sum("a" in tokenizer.decode(row) for row in rows) / len(rows)
    assert 0.68 < share < 0.82


def test_parts_are_the_trained_targets_in_rows_of_about_one_length(tmp_path):
    info = written(tmp_path, corpus_of(*("d" * number for number in range(1, 60))), context=60)
    inputs, targets = Tokens(tmp_path / TOKENS_TRAIN, info, 60).draw(20, 0, 0)
    targets[3, :10] = targets[7] = NOT_TRAINED
    parts = in_parts((inputs, targets), 8)
    assert [len(part) for part, _ in parts] == [8, 8, 4]
    assert [part.shape[1] for part, _ in parts] == sorted(part.shape[1] for part, _ in parts)

    def trained(batches: Sequence[Batch]) -> list[tuple[list[int], int]]:
        """The tokens before each trained target, and the target."""
        rows = [row for one, other in batches for row in zip(one.tolist(), other.tolist(), strict=True)]
        return sorted((row[: i + 1], target) for row, wanted in rows for i, target in enumerate(wanted) if target >= 0)

    assert trained(parts) == trained([(inputs, targets)])
    assert sum(part.numel() for part, _ in parts) < 0.9 * inputs.numel()

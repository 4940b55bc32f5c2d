"""Penalties on hand-made logits, and llama.cpp's cases."""

from __future__ import annotations

import numpy as np
import pytest

from pastkey.runtime.sampling import penalties
from pastkey.runtime.sampling.truncation import softmax

BANNED = -np.inf


def log(probabilities: list[float]) -> np.ndarray:
    return np.log(np.array(probabilities, np.float32))


def test_presence_counts_once_and_frequency_each_time():
    logits = np.array([2.0, -2.0, 4.0, BANNED], np.float32)
    found = penalties.apply_presence_and_frequency_penalty(logits, [0, 1, 0, 0, 3], 0.5, 0.25)
    np.testing.assert_array_equal(found, [0.75, -2.75, 4, BANNED])
    np.testing.assert_array_equal(penalties.apply_presence_and_frequency_penalty(logits, [], 0.5, 0.25), logits)
    np.testing.assert_array_equal(penalties.apply_presence_and_frequency_penalty(logits, [0], -1, -1)[0], 4)


def test_only_the_last_tokens_count():
    assert penalties.last([1, 2, 3], -1).tolist() == [1, 2, 3]
    assert [penalties.last([1, 2, 3], count).tolist() for count in (0, 2, 3, 9)] == [[], [2, 3], [1, 2, 3], [1, 2, 3]]


# --- n-grams ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("size", "seen", "expected"),
    [
        (3, [1, 2, 3, 1, 2], {3}),
        (3, [1, 2, 3, 1, 2, 4, 1, 2], {3, 4}),
        (2, [5, 5], {5}),
        (1, [4, 0, 4], {0, 4}),
    ],
)
def test_no_sequence_of_that_size_comes_twice(size, seen, expected):
    logits = np.zeros(6, np.float32)
    found = penalties.ban_repeated_ngrams(logits, seen, size)
    assert set(np.flatnonzero(found == BANNED).tolist()) == expected
    assert not np.isinf(logits).any()


# --- llama.cpp's cases: tests/test-sampling.cpp at 07e4038 --------------------------------------------------------
FIFTHS = [0.2] * 5


@pytest.mark.parametrize(
    ("seen", "expected", "repetition", "frequency", "presence"),
    [
        ([0], [0, 0.25, 0.25, 0.25, 0.25], 50.0, 0.0, 0.0),
        ([0, 1, 2, 0, 0], [0, 0, 0, 0.5, 0.5], 50.0, 0.0, 0.0),
        ([0], [0.000011, 0.249997, 0.249997, 0.249997, 0.249997], 1.0, 5.0, 5.0),
        ([0, 1, 2, 0, 0], [0.000000, 0.000023, 0.000023, 0.499977, 0.499977], 1.0, 5.0, 5.0),
    ],
)
def test_the_penalties_together(seen, expected, repetition, frequency, presence):
    changed = penalties.apply_repetition_penalty(log(FIFTHS), seen, repetition)
    changed = penalties.apply_presence_and_frequency_penalty(changed, seen, presence, frequency)
    np.testing.assert_allclose(softmax(changed), expected, atol=1e-5)

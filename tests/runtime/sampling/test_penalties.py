"""Penalties on hand-made logits, and llama.cpp's cases."""

from __future__ import annotations

import numpy as np
import pytest

from pastkey.runtime.sampling import bans, penalties
from pastkey.runtime.sampling.truncation import softmax

BANNED = -np.inf


def log(probabilities: list[float]) -> np.ndarray:
    return np.log(np.array(probabilities, np.float32))


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


def test_no_stage_writes_into_its_logits():
    logits = np.array([1.0, 2.0, 3.0, 4.0, 5.0], np.float32)
    logits.flags.writeable = False
    bans.add_bias(logits, {1: 2.0})
    bans.suppress(logits, [1])
    bans.force(logits, 1)
    bans.ban_bad_words(logits, [1], bans.bad_words([[1]]))
    penalties.ban_repeated_ngrams(logits, [1, 2, 1], 2)
    penalties.apply_repetition_penalty(logits, [1], 2.0)
    penalties.apply_presence_and_frequency_penalty(logits, [1], 1.0, 1.0)
    np.testing.assert_array_equal(logits, [1, 2, 3, 4, 5])

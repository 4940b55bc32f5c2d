"""Penalties on hand-made logits, and llama.cpp's cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pastkey.runtime.sampling import penalties
from pastkey.runtime.sampling.truncation import softmax

BANNED = -np.inf


def log(probabilities: list[float]) -> np.ndarray:
    return np.log(np.array(probabilities, np.float32))


def test_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    logits = np.array([2.0, -2.0, 4.0, BANNED], np.float32)
    np.testing.assert_allclose(penalties.apply_repetition_penalty(logits, [0, 1, 0, 3], 2.0), [1, -4, 4, BANNED])
    np.testing.assert_array_equal(penalties.apply_repetition_penalty(logits, [], 2.0), logits)


def test_presence_counts_once_and_frequency_each_time() -> None:
    logits = np.array([2.0, -2.0, 4.0, BANNED], np.float32)
    found = penalties.apply_presence_and_frequency_penalty(logits, [0, 1, 0, 0, 3], 0.5, 0.25)
    np.testing.assert_array_equal(found, [0.75, -2.75, 4, BANNED])
    np.testing.assert_array_equal(penalties.apply_presence_and_frequency_penalty(logits, [], 0.5, 0.25), logits)
    np.testing.assert_array_equal(penalties.apply_presence_and_frequency_penalty(logits, [0], -1, -1)[0], 4)


def test_only_the_last_tokens_count() -> None:
    assert penalties.last([1, 2, 3], -1).tolist() == [1, 2, 3]
    assert [penalties.last([1, 2, 3], count).tolist() for count in (0, 2, 3, 9)] == [[], [2, 3], [1, 2, 3], [1, 2, 3]]


# --- n-grams ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("size", "seen", "expected"),
    [
        (3, [1, 2, 3, 1, 2], {3}),
        (3, [1, 2, 3, 1, 2, 4, 1, 2], {3, 4}),
        (3, [1, 2, 3, 2, 1], set()),
        (3, [1, 2], set()),
        (2, [1], set()),
        (2, [5, 5], {5}),
        (1, [4, 0, 4], {0, 4}),
        (1, [], set()),
        (9, [1, 2], set()),
    ],
)
def test_no_sequence_of_that_size_comes_twice(size: int, seen: list[int], expected: set[int]) -> None:
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
        ([0, 1, 2], [0, 0, 0, 0.5, 0.5], 50.0, 0.0, 0.0),
        ([0, 1, 2, 0, 0], [0, 0, 0, 0.5, 0.5], 50.0, 0.0, 0.0),
        ([0], [0.000011, 0.249997, 0.249997, 0.249997, 0.249997], 1.0, 5.0, 5.0),
        ([0, 1, 2], [0.000023, 0.000023, 0.000023, 0.499966, 0.499966], 1.0, 5.0, 5.0),
        ([0, 1, 2, 0, 0], [0.000000, 0.000023, 0.000023, 0.499977, 0.499977], 1.0, 5.0, 5.0),
    ],
)
def test_the_penalties_together(
    seen: list[int], expected: list[float], repetition: float, frequency: float, presence: float
) -> None:
    changed = penalties.apply_repetition_penalty(log(FIFTHS), seen, repetition)
    changed = penalties.apply_presence_and_frequency_penalty(changed, seen, presence, frequency)
    np.testing.assert_allclose(softmax(changed), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("seen", "expected", "multiplier", "allowed_length", "breakers"),
    [
        ([0, 1], [0.25] * 4, 1.0, 2, {}),
        ([0, 1, 2, 0, 1], [0.296923, 0.296923, 0.109232, 0.296923], 1.0, 2, {}),
        ([0, 1, 3, 4, 0, 1], FIFTHS, 1.0, 2, {3: [()]}),
        ([0, 1, 2, 0, 1], [0.241818, 0.241818, 0.032727, 0.241818, 0.241818], 2.0, 2, {}),
        ([0, 1, 2, 3, 4, 0, 1], FIFTHS, 1.0, 4, {}),
    ],
)
def test_dry(
    seen: list[int],
    expected: list[float],
    multiplier: float,
    allowed_length: int,
    breakers: dict[int, list[tuple[int, ...]]],
) -> None:
    logits = log([1 / len(expected)] * len(expected))
    changed = penalties.apply_dry(logits, seen, multiplier, 1.1, allowed_length, breakers)
    np.testing.assert_allclose(softmax(changed), expected, atol=1e-5)


# --- DRY ------------------------------------------------------------------------------------------------------------
def dry_by_definition(
    size: int, seen: list[int], base: float, allowed: int, breakers: dict[int, list[tuple[int, ...]]]
) -> np.ndarray:
    """Each earlier place on its own, token by token."""
    since = len(seen)
    for place in range(len(seen) - 1, -1, -1):
        tails = [t for t in breakers.get(seen[place], []) if tuple(seen[place + 1 : place + 1 + len(t)]) == t]
        if tails:
            since = len(seen) - place - 1 - max(map(len, tails))
            break
    longest: dict[int, int] = {}
    for end in range(len(seen) - 1):  # the repetition ends at `end`, and seen[end + 1] followed it
        length = 0
        while length <= end and seen[end - length] == seen[-1 - length]:
            length += 1
        length = min(length, since)
        if length >= allowed and since >= allowed and len(seen) > allowed:
            longest[seen[end + 1]] = max(length, longest.get(seen[end + 1], 0))
    penalty = np.zeros(size)
    for token, length in longest.items():
        if () not in breakers.get(token, []):
            penalty[token] = base ** (length - allowed)
    return penalty


@given(
    seen=st.lists(st.integers(0, 3), max_size=30),
    base=st.sampled_from([1.0, 1.1, 1.75]),
    allowed=st.integers(0, 4),
    breakers=st.dictionaries(
        st.integers(0, 3), st.lists(st.lists(st.integers(0, 3), max_size=2).map(tuple), min_size=1), max_size=2
    ),
)
def test_dry_equals_its_definition(
    seen: list[int], base: float, allowed: int, breakers: dict[int, list[tuple[int, ...]]]
) -> None:
    logits = np.array([0.5, -1.0, 2.0, 0.0], np.float32)
    found = penalties.apply_dry(logits, seen, 2.0, base, allowed, breakers)
    np.testing.assert_allclose(found, logits - 2.0 * dry_by_definition(4, seen, base, allowed, breakers))


def test_a_breaker_of_several_tokens_counts_where_it_is_whole() -> None:
    logits, seen = np.zeros(9, np.float32), [1, 2, 5, 3, 7, 8, 1, 2]
    with_tail = {7: [(8,)], 3: [(4,)]}
    assert penalties.apply_dry(logits, seen, 1.0, breakers=with_tail)[5] == -1  # two since the breaker
    assert penalties.apply_dry(logits, [*seen[:-2], 2], 1.0, allowed_length=1, breakers=with_tail)[5] == -1
    assert penalties.apply_dry(logits, [1, 2, 5, 1, 7, 8], 1.0, allowed_length=1, breakers=with_tail).max() == 0
    longer = [0, 1, 2, 5, 3, 0, 7, 8, 1, 2]
    assert penalties.apply_dry(logits, [*longer[:5], *longer], 1.0, breakers=with_tail)[5] == -1


def test_the_penalty_of_a_long_repetition_is_finite() -> None:
    found = penalties.apply_dry(np.zeros(3, np.float32), [1] * 5000, 1.0, 1.75)
    assert np.isfinite(found).all()
    assert found[1] == pytest.approx(-(1.75**158))  # the largest power that float32 holds

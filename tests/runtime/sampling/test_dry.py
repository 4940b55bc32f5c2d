"""DRY on llama.cpp's cases, and against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pastkey.runtime.sampling.dry import apply_dry, sequence_breakers
from pastkey.runtime.sampling.truncation import softmax

FIFTHS = [0.2] * 5


def log(probabilities: list[float]) -> np.ndarray:
    return np.log(np.array(probabilities, np.float32))


# tests/test-sampling.cpp of llama.cpp at 07e4038
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
def test_dry(seen, expected, multiplier, allowed_length, breakers):
    logits = log([1 / len(expected)] * len(expected))
    changed = apply_dry(logits, seen, multiplier, 1.1, allowed_length, breakers)
    np.testing.assert_allclose(softmax(changed), expected, atol=1e-5)


# --- by definition -----------------------------------------------------------------------------------------------
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
def test_dry_equals_its_definition(seen, base, allowed, breakers):
    logits = np.array([0.5, -1.0, 2.0, 0.0], np.float32)
    found = apply_dry(logits, seen, 2.0, base, allowed, breakers)
    np.testing.assert_allclose(found, logits - 2.0 * dry_by_definition(4, seen, base, allowed, breakers))


def test_the_penalty_of_a_long_repetition_is_finite():
    found = apply_dry(np.zeros(3, np.float32), [1] * 5000, 1.0, 1.75)
    assert np.isfinite(found).all()
    assert found[1] == pytest.approx(-(1.75**158))  # the largest power that float32 holds


# --- breakers -------------------------------------------------------------------------------------------------------
PIECES = ["a", "\n", ".\n", "*", "x*", "**", "**b", "<", "</", "</s", "end"]


def encode(text: str) -> list[int]:
    return [PIECES.index(letter) if letter in PIECES else 99 for letter in text]


def test_a_token_that_holds_a_breaker_breaks_alone():
    found = sequence_breakers(["\n", "*", [7, 8], [0]], PIECES, encode)
    assert found == {1: {()}, 2: {()}, 3: {()}, 4: {()}, 5: {()}, 6: {()}, 7: {(8,)}, 0: {()}}


def test_a_token_that_begins_one_breaks_with_the_rest():
    found = sequence_breakers(["**"], PIECES, encode)
    assert found == {3: {(3,)}, 4: {(3,)}, 5: {()}, 6: {()}}
    assert sequence_breakers(["</a"], PIECES, encode) == {7: {(99, 0)}, 8: {(0,)}}
    assert sequence_breakers(["a" * 100], ["a", "b" + "a" * 40], lambda text: [0] * len(text)) == {
        0: {(0,) * 20},
        1: {()},
    }
    assert sequence_breakers(["aaa"], ["aa"], lambda text: [0] * len(text)) == {0: {(0,), (0, 0)}}

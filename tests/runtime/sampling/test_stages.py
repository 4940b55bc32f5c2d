"""Stages on hand-made logits. Temperature, top_k, top_p and min_p are those of the definition in vectors.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pastkey.runtime.sampling import bans, penalties
from pastkey.runtime.sampling import truncation as sampling
from pastkey.runtime.sampling.dry import apply_dry, sequence_breakers

logit_arrays = arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32))
with_bans = arrays(np.float32, st.integers(1, 40), elements=st.sampled_from([-np.inf, -9.0, -1.0, 0.0, 0.5, 0.5, 4.0]))


def kept(logits: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.isfinite(logits)).tolist())


def log(probabilities: list[float]) -> np.ndarray:
    return np.log(np.array(probabilities, np.float32))


# --- llama.cpp's cases: tests/test-sampling.cpp at 07e4038, probabilities in, probabilities out ---------------------
def penalised(logits: Any, seen: list[int], repetition: float, frequency: float, presence: float) -> Any:
    logits = penalties.apply_repetition_penalty(logits, seen, repetition)
    return penalties.apply_presence_and_frequency_penalty(logits, seen, presence, frequency)


RISING, FALLING, FIFTHS = [0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.2] * 5
CASES: list[tuple[Any, list[float], tuple[Any, ...], list[float]]] = [
    (sampling.keep_top_n_sigma, RISING, (1.0,), [0, 0, 0.3, 0.4]),
    (sampling.keep_top_n_sigma, RISING, (3.0,), RISING),
    (sampling.keep_top_n_sigma, RISING, (0.5,), [0, 0, 0, 0.4]),
    (sampling.keep_top_n_sigma, RISING, (1e30,), RISING),
    (sampling.exclude_top_choices, FALLING, (0.09,), [0, 0, 0, 0.1]),
    (sampling.exclude_top_choices, FALLING, (0.29,), [0, 0.3, 0.2, 0.1]),
    (sampling.exclude_top_choices, FALLING, (0.5,), FALLING),
    (sampling.exclude_top_choices, [0.3, 0.05, 0.3, 0.3, 0.05], (0.2,), [0, 0.05, 0, 0.3, 0.05]),  # the last stays
    (sampling.keep_typical, [0.97, 0.01, 0.01, 0.01], (0.5,), [0.97, 0, 0, 0]),
    (sampling.keep_typical, [0.4, 0.2, 0.2, 0.2], (0.5,), [0, 0.2, 0.2, 0.2]),
    (penalised, FIFTHS, ([0], 50.0, 0.0, 0.0), [0, 0.25, 0.25, 0.25, 0.25]),
    (penalised, FIFTHS, ([0, 1, 2, 0, 0], 50.0, 0.0, 0.0), [0, 0, 0, 0.5, 0.5]),
    (penalised, FIFTHS, ([0], 1.0, 5.0, 5.0), [0.000011, 0.249997, 0.249997, 0.249997, 0.249997]),
    (penalised, FIFTHS, ([0, 1, 2, 0, 0], 1.0, 5.0, 5.0), [0.000000, 0.000023, 0.000023, 0.499977, 0.499977]),
    (apply_dry, [0.25] * 4, ([0, 1], 1.0, 1.1, 2, {}), [0.25] * 4),
    (apply_dry, [0.25] * 4, ([0, 1, 2, 0, 1], 1.0, 1.1, 2, {}), [0.296923, 0.296923, 0.109232, 0.296923]),
    (apply_dry, FIFTHS, ([0, 1, 3, 4, 0, 1], 1.0, 1.1, 2, {3: [()]}), FIFTHS),
    (apply_dry, FIFTHS, ([0, 1, 2, 0, 1], 2.0, 1.1, 2, {}), [0.241818, 0.241818, 0.032727, 0.241818, 0.241818]),
    (apply_dry, FIFTHS, ([0, 1, 2, 3, 4, 0, 1], 1.0, 1.1, 4, {}), FIFTHS),
]


@pytest.mark.parametrize(("stage", "probabilities", "arguments", "expected"), CASES)
def test_a_stage_gives_these_probabilities(stage, probabilities, arguments, expected):
    found = sampling.softmax(stage(log(probabilities), *arguments))
    np.testing.assert_allclose(found, np.array(expected) / sum(expected), atol=1e-5)


@pytest.mark.parametrize("n", [1.0, 0.5])
def test_neither_a_temperature_nor_what_is_banned_changes_what_top_n_sigma_keeps(n):
    tempered = sampling.apply_temperature(np.append(log(RISING), np.float32(-np.inf)), 0.01)
    assert kept(sampling.keep_top_n_sigma(tempered, n)) == kept(sampling.keep_top_n_sigma(log(RISING), n))


# --- by definition --------------------------------------------------------------------------------------------------
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
    found = penalties.ban_repeated_ngrams(np.zeros(6, np.float32), seen, size)
    assert kept(found) == {*range(6)} - expected


def test_typical_of_many_tokens_is_as_by_a_whole_sort():
    rng = np.random.default_rng(0)
    for scale in (0.01, 1.0, 3.0):
        logits = rng.normal(0, scale, 9000)
        probabilities = sampling.softmax(logits)
        distance = np.abs(-np.log(probabilities) + np.sum(probabilities * np.log(probabilities)))
        order = np.argsort(distance)
        for p in (0.1, 0.9, 0.999):
            few = order[: int((np.cumsum(probabilities[order]) < p).sum()) + 1]
            assert kept(sampling.keep_typical(logits, p)) == set(few.tolist())


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
    assert found.tolist() == [0, pytest.approx(-(1.75**158)), 0]  # the largest power that float32 holds


PIECES = ["a", "\n", ".\n", "*", "x*", "**", "**b", "<", "</", "</s", "end"]


@pytest.mark.parametrize(
    ("breakers", "pieces", "expected"),
    [
        (["\n", "*", [7, 8], [0]], PIECES, {7: {(8,)}} | {place: {()} for place in range(7)}),  # a token that holds one
        (["**"], PIECES, {3: {(3,)}, 4: {(3,)}, 5: {()}, 6: {()}}),  # a token that begins one breaks with the rest
        (["</a"], PIECES, {7: {(99, 0)}, 8: {(0,)}}),
        (["a" * 100], ["a", "b" + "a" * 40], {0: {(0,) * 20}, 1: {()}}),
        (["aaa"], ["aa"], {0: {(99,), (99, 99)}}),
    ],
)
def test_breakers_are_tokens_and_those_that_follow_them(breakers, pieces, expected):
    def encode(text: str) -> list[int]:
        return [pieces.index(letter) if letter in pieces else 99 for letter in text]

    assert sequence_breakers(breakers, pieces, encode) == expected


# --- what holds of all of them --------------------------------------------------------------------------------------
STAGES = {
    "top_k": lambda x: sampling.keep_top_k(x, 3),
    "top_p": lambda x: sampling.keep_top_p(x, 0.6),
    "min_p": lambda x: sampling.keep_min_p(x, 0.2),
    "typical": lambda x: sampling.keep_typical(x, 0.6),
    "sigma": lambda x: sampling.keep_top_n_sigma(x, 1.0),
    "xtc": lambda x: sampling.exclude_top_choices(x, 0.1),
}


@pytest.mark.parametrize("stage", STAGES)
@settings(max_examples=50)
@given(logits=logit_arrays | with_bans, factor=st.sampled_from([1.0, 1e4, 1e300]))
def test_a_stage_drops_tokens_and_changes_none(stage, logits, factor):
    """A banned token stays banned, one token stays, no input is written into, and no warning is given."""
    if np.isneginf(logits).all():
        logits[0] = 1.0
    logits = logits.astype(np.float64) * factor if factor != 1 else logits
    logits.flags.writeable = False
    result = STAGES[stage](logits)
    assert result.shape == logits.shape
    assert kept(result)
    assert kept(result) <= kept(logits)
    places = list(kept(result))
    np.testing.assert_array_equal(result[places], logits[places])


def test_no_stage_writes_into_its_logits():
    logits = np.array([1.0, 2.0, 3.0, 4.0, 5.0], np.float32)
    logits.flags.writeable = False  # which numpy refuses to write into
    bans.add_bias(logits, {1: 2.0})
    bans.suppress(logits, [1])
    bans.force(logits, 1)
    bans.ban_bad_words(logits, [1], bans.bad_words([[1]]))
    penalties.ban_repeated_ngrams(logits, [1, 2, 1], 2)
    penalised(logits, [1], 2.0, 1.0, 1.0)


# --- the draw -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("drawn", "expected"), [(0.0, 1), (0.49, 1), (0.51, 3), (1 - 2**-53, 3)])
def test_the_ends_of_the_unit_interval_draw_tokens_with_probability(drawn, expected):
    logits = np.array([-np.inf, 1.0, -np.inf, 1.0, -np.inf])
    assert sampling.draw(logits, drawn) == expected


@pytest.mark.parametrize("size", [7, 1000, 49152])
def test_a_draw_of_few_among_many_is_bit_for_bit_that_of_all(size):
    """The probabilities of the text's definition, in docs/bundle-format.md, over the whole vocabulary."""
    rng = np.random.default_rng(size)
    for _ in range(20):
        logits = sampling.keep_top_k(rng.normal(0, 3, size), int(rng.integers(1, size)))
        exponentials = np.exp(logits - logits.max())
        sums = np.cumsum(exponentials / exponentials.sum())
        quotients = sums / sums[-1]
        some = quotients[rng.integers(0, size, 20)]
        for u in [0.0, 1 - 2**-53, *rng.random(20), *some[some < 1], *np.nextafter(some, 0)]:
            assert sampling.draw(logits, float(u)) == int(np.searchsorted(quotients, u, side="right"))

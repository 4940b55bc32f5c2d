"""Stages on hand-made logits. Temperature, top_k, top_p and min_p are those of the definition in vectors.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pastkey.runtime.sampling import truncation as sampling

logit_arrays = arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32))
with_bans = arrays(np.float32, st.integers(1, 40), elements=st.sampled_from([-np.inf, -9.0, -1.0, 0.0, 0.5, 0.5, 4.0]))


def kept(logits: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.isfinite(logits)).tolist())


@pytest.mark.parametrize(("drawn", "expected"), [(0.0, 1), (0.49, 1), (0.51, 3), (1 - 2**-53, 3)])
def test_the_ends_of_the_unit_interval_draw_tokens_with_probability(drawn, expected):
    logits = np.array([-np.inf, 1.0, -np.inf, 1.0, -np.inf])
    assert sampling.draw(logits, drawn) == expected


# --- llama.cpp's cases: tests/test-sampling.cpp at 07e4038, probabilities in, probabilities out ---------------------
TENTHS = [0.1, 0.2, 0.3, 0.4]


def after(expected: list[float], changed: np.ndarray) -> None:
    """Compares what is left, in descending order."""
    found = np.sort(sampling.softmax(changed))[::-1]
    np.testing.assert_allclose(found[found > 0], np.sort(np.array(expected) / sum(expected))[::-1], atol=1e-5)


def log(probabilities: list[float]) -> np.ndarray:
    return np.log(np.array(probabilities, np.float32))


@pytest.mark.parametrize(
    ("n", "expected"), [(1.0, [0.3, 0.4]), (3.0, TENTHS), (0.5, [0.4]), (1e30, TENTHS)], ids=["1", "3", "half", "huge"]
)
def test_top_n_sigma(n, expected):
    after(expected, sampling.keep_top_n_sigma(log(TENTHS), n))
    # Neither a temperature before it nor what is banned changes what it keeps.
    banned = np.append(log(TENTHS), np.float32(-np.inf))
    tempered = sampling.apply_temperature(banned, 0.01)
    assert kept(sampling.keep_top_n_sigma(tempered, n)) == kept(sampling.keep_top_n_sigma(log(TENTHS), n))


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.09, [0.1]),
        (0.29, [0.3, 0.2, 0.1]),
        (0.5, [0.4, 0.3, 0.2, 0.1]),
    ],
)
def test_xtc_excludes_all_top_choices_but_the_last(threshold, expected):
    after(expected, sampling.exclude_top_choices(log([0.4, 0.3, 0.2, 0.1]), threshold))


def test_of_equal_top_choices_the_last_one_stays():
    assert kept(sampling.exclude_top_choices(log([0.3, 0.05, 0.3, 0.3, 0.05]), 0.2)) == {1, 3, 4}


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [([0.97, 0.01, 0.01, 0.01], [0.97]), ([0.4, 0.2, 0.2, 0.2], [0.2, 0.2, 0.2])],
)
def test_typical(probabilities, expected):
    after(expected, sampling.keep_typical(log(probabilities), 0.5))


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
    """What is banned stays so, one token stays, nothing is written into, and no warning is given."""
    if np.isneginf(logits).all():
        logits[0] = 1.0
    logits = logits.astype(np.float64) * factor if factor != 1 else logits
    before = logits.copy()
    logits.flags.writeable = False
    result = STAGES[stage](logits)
    assert result.shape == logits.shape
    np.testing.assert_array_equal(logits, before)
    assert kept(result)
    assert kept(result) <= kept(logits)
    places = list(kept(result))
    np.testing.assert_array_equal(result[places], logits[places])


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

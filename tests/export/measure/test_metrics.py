"""The figures of how far two models' predictions are apart, against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pastkey.errors import NumericsError
from pastkey.export.measure.metrics import (
    Sums,
    agreeing_tokens,
    kl_by_position,
    kl_divergence,
    log_softmax,
    perplexity,
    relative_difference,
    softmax,
    top1_agreement,
)

LOGITS = arrays(np.float32, (3, 5), elements=st.floats(-50, 50, width=32))


def test_log_softmax_of_known_odds():
    found = log_softmax(np.log(np.array([[1, 3]], np.float32)))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [[math.log(0.25), math.log(0.75)]], rtol=1e-6)


def test_log_softmax_does_not_overflow():
    np.testing.assert_allclose(log_softmax(np.array([[1e30, 0.0]], np.float32)), [[0.0, -1e30]])


def test_kl_divergence_of_two_coins_in_nats():
    fair, biased = np.log(np.array([[0.5, 0.5]], np.float32)), np.log(np.array([[0.9, 0.1]], np.float32))
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_divergence(fair, biased) == pytest.approx(expected, rel=1e-6)
    assert kl_divergence(biased, fair) != pytest.approx(expected, rel=1e-2)  # it has a direction


@given(LOGITS, LOGITS, st.floats(-20, 20))
def test_kl_divergence_is_not_negative_and_knows_no_constant(a, b, shift):
    assert kl_divergence(a, b) >= 0
    assert kl_divergence(a, a) == 0
    assert kl_divergence(a, a + np.float32(shift)) == pytest.approx(0, abs=1e-5)


def test_top1_agreement_is_a_share_of_positions():
    a = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    b = np.array([[1, 0], [0, 1], [0, 1], [0, 2]], np.float32)
    assert top1_agreement(a, b) == 0.75


def test_relative_difference_is_of_the_largest_logit():
    a = np.array([[-44.0, 2.0]], np.float32)
    assert relative_difference(a, a + np.float32(0.44)) == pytest.approx(0.01, rel=1e-4)
    assert relative_difference(a, a) == 0


def test_relative_difference_of_nothing_but_zeros_is_zero():
    zeros = np.zeros((2, 3), np.float32)
    assert relative_difference(zeros, zeros) == 0
    assert relative_difference(zeros, zeros + np.float32(1e-6)) > 1


def test_perplexity_of_an_even_choice_is_the_number_of_choices():
    assert perplexity(math.log(61)) == pytest.approx(61)
    with pytest.raises(NumericsError, match="loses 1e\\+03 nats per token"):
        perplexity(1e3)


def test_agreeing_tokens_are_those_before_the_first_difference():
    asked = iter([1, 2, 9, 4])
    assert agreeing_tokens(asked, [1, 2, 3, 4]) == 2
    assert next(asked) == 4  # nothing was asked for after it
    assert agreeing_tokens([1, 2], [1, 2]) == 2


# --- the one KL ---------------------------------------------------------------------------------------------------
def exactly(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL by its definition, in extended precision."""
    p, q = (x.astype(np.longdouble) for x in (reference, logits))
    p, q = (x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
            for x in (p, q))  # fmt: skip
    return np.asarray((np.exp(p) * (p - q)).sum(-1))


@pytest.mark.parametrize("vocabulary", [61, 5000])
@pytest.mark.parametrize("noise", [1e-4, 1e-2, 1, 10])
def test_kl_is_exact_to_a_millionth_however_small_or_large(vocabulary, noise):
    rng = np.random.default_rng(0)
    reference = (3 * rng.normal(size=(20, vocabulary))).astype(np.float32)
    logits = (reference + noise * rng.normal(size=reference.shape)).astype(np.float32)
    found = kl_by_position(reference, softmax(reference), logits)
    np.testing.assert_allclose(found, exactly(reference, logits).astype(np.float64), rtol=2e-6)


def test_kl_of_predictions_with_nothing_in_common_is_their_distance():
    """A probability of e^-200 is no float32."""
    reference, logits = np.array([[100.0, -100.0]], np.float32), np.array([[-100.0, 100.0]], np.float32)
    assert kl_divergence(reference, logits) == pytest.approx(200, rel=1e-9)
    assert kl_divergence(reference, 100 * logits) == pytest.approx(20000, rel=1e-9)


def test_kl_takes_any_number_of_axes_and_leaves_its_arguments_alone():
    rng = np.random.default_rng(0)
    reference, logits = rng.normal(size=(2, 2, 3, 5)).astype(np.float32)
    before = reference.copy(), logits.copy()
    found = kl_by_position(reference, softmax(reference), logits)
    assert found.shape == (2, 3)
    np.testing.assert_allclose(found, exactly(reference, logits).astype(np.float64), rtol=1e-6)
    assert np.array_equal(reference, before[0])
    assert np.array_equal(logits, before[1])


def test_kl_of_nan_is_nan():
    """Which no limit lets pass."""
    logits = np.zeros((1, 3), np.float32)
    assert math.isnan(kl_divergence(logits, np.full_like(logits, np.nan)))


def test_sums_of_windows_are_those_of_all_positions_together():
    rng = np.random.default_rng(0)
    sums, ids, logits, expected = Sums(), list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    for length in (130, 64, 3):
        ids.append(rng.integers(0, 7, length))
        logits.append(rng.normal(size=(length, 7)).astype(np.float32))
        expected.append(rng.normal(size=(length, 7)).astype(np.float32))
        sums.add(ids[-1], logits[-1], expected[-1])
    both = np.concatenate(expected), np.concatenate(logits)
    assert sums.tokens == 197
    assert sums.predicted == 194
    assert sums.kl / sums.tokens == pytest.approx(kl_divergence(*both), rel=1e-12)
    assert sums.same_top / sums.tokens == top1_agreement(*both)
    for total, windows in ((sums.loss, logits), (sums.reference_loss, expected)):
        losses = [-log_softmax(w)[np.arange(len(i) - 1), i[1:]].sum() for w, i in zip(windows, ids, strict=True)]
        assert total == pytest.approx(sum(losses), rel=1e-12)

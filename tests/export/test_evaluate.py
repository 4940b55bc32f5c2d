"""The figures of how far two models are apart, against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pastkey.export.evaluate import kl_divergence, log_softmax, relative_difference, top1_agreement

LOGITS = arrays(np.float32, (3, 5), elements=st.floats(-50, 50, width=32))


def test_log_softmax_of_known_odds() -> None:
    found = log_softmax(np.log(np.array([[1, 3]], np.float32)))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [[math.log(0.25), math.log(0.75)]], rtol=1e-6)


def test_log_softmax_does_not_overflow() -> None:
    np.testing.assert_allclose(log_softmax(np.array([[1e30, 0.0]], np.float32)), [[0.0, -1e30]])


def test_kl_divergence_of_two_coins_in_nats() -> None:
    fair, biased = np.log(np.array([[0.5, 0.5]], np.float32)), np.log(np.array([[0.9, 0.1]], np.float32))
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_divergence(fair, biased) == pytest.approx(expected, rel=1e-6)
    assert kl_divergence(biased, fair) != pytest.approx(expected, rel=1e-2)  # it has a direction


def test_kl_divergence_is_the_mean_over_positions() -> None:
    fair, biased = np.log(np.array([[0.5, 0.5]], np.float32)), np.log(np.array([[0.9, 0.1]], np.float32))
    both = kl_divergence(np.concatenate([fair, fair]), np.concatenate([fair, biased]))
    assert both == pytest.approx(kl_divergence(fair, biased) / 2, rel=1e-6)


@given(LOGITS, LOGITS, st.floats(-20, 20))
def test_kl_divergence_is_not_negative_and_knows_no_constant(a: np.ndarray, b: np.ndarray, shift: float) -> None:
    assert kl_divergence(a, b) >= 0
    assert kl_divergence(a, a) == 0
    assert kl_divergence(a, a + np.float32(shift)) == pytest.approx(0, abs=1e-5)


def test_kl_divergence_resolves_what_float32_would_hide() -> None:
    logits = np.array([[2.0, 1.0, 0.0]], np.float32)
    assert 0 < kl_divergence(logits, logits + np.array([[1e-4, 0, 0]], np.float32)) < 1e-8


def test_top1_agreement_is_a_share_of_positions() -> None:
    a = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    b = np.array([[1, 0], [0, 1], [0, 1], [0, 2]], np.float32)
    assert top1_agreement(a, b) == 0.75


def test_relative_difference_is_of_the_largest_logit() -> None:
    a = np.array([[-44.0, 2.0]], np.float32)
    assert relative_difference(a, a + np.float32(0.44)) == pytest.approx(0.01, rel=1e-4)
    assert relative_difference(a, a) == 0


def test_relative_difference_of_nothing_but_zeros_is_zero() -> None:
    zeros = np.zeros((2, 3), np.float32)
    assert relative_difference(zeros, zeros) == 0
    assert relative_difference(zeros, zeros + np.float32(1e-6)) > 1

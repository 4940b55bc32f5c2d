"""The figures of how well a model predicts and how far two are apart, against their definitions."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pastkey.errors import NumericsError
from pastkey.export.evaluate import (
    BundlePredictions,
    agreeing_tokens,
    cut_windows,
    evaluate,
    kl_divergence,
    log_softmax,
    perplexity,
    relative_difference,
    top1_agreement,
)
from pastkey.export.reference import ModulePredictions

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


def test_perplexity_of_an_even_choice_is_the_number_of_choices() -> None:
    assert perplexity(math.log(61)) == pytest.approx(61)
    with pytest.raises(NumericsError, match="loses 1e\\+03 nats per token"):
        perplexity(1e3)


def test_agreeing_tokens_are_those_before_the_first_difference() -> None:
    asked = iter([1, 2, 9, 4])
    assert agreeing_tokens(asked, [1, 2, 3, 4]) == 2
    assert next(asked) == 4  # nothing was asked for after it
    assert agreeing_tokens([1, 2], [1, 2]) == 2


# --- windows ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("count", "length", "most", "expected"),
    [
        (10, 4, 9, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),
        (9, 4, 9, [[0, 1, 2, 3], [4, 5, 6, 7]]),  # one token alone has nothing to be predicted from
        (10, 4, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (3, 4, 9, [[0, 1, 2]]),
        (4, 2, 9, [[0, 1], [2, 3]]),
    ],
)
def test_windows_follow_one_another_from_the_beginning(
    count: int, length: int, most: int, expected: list[list[int]]
) -> None:
    found = cut_windows(range(count), length, most)
    assert [window.tolist() for window in found] == expected
    assert {window.dtype for window in found} == {np.dtype(np.int64)}


# --- evaluating ---------------------------------------------------------------------------------------------------
class Fake:
    """Logits of ids by a function, and a greedy continuation that is always the same."""

    def __init__(self, name: str, logits: Callable[[np.ndarray], np.ndarray], continuation: Sequence[int]) -> None:
        self.name, self.logits, self.continuation = name, logits, list(continuation)
        self.asked: list[tuple[int, int]] = []  # tokens of a prompt, and of its continuation

    def greedy(self, prompt: np.ndarray, count: int) -> list[int]:
        self.asked.append((prompt.size, count))
        return self.continuation[:count]

    def agreeing(self, prompt: np.ndarray, tokens: Sequence[int]) -> int:
        return agreeing_tokens(self.continuation, tokens)


def certain_of_the_same(ids: np.ndarray) -> np.ndarray:
    """3 to 1 that the next token of two is the one before."""
    return np.log(np.where(np.arange(2) == ids[:, None], 0.75, 0.25)).astype(np.float32)


def undecided(ids: np.ndarray) -> np.ndarray:
    return np.zeros((ids.size, 2), np.float32)


def measured(*arguments: Any, **others: Any) -> Any:
    return evaluate(*arguments, **others)


def test_figures_of_known_odds_over_windows_of_different_lengths() -> None:
    bundle, reference = Fake("a", certain_of_the_same, [1, 1]), Fake("b", undecided, [1, 1])
    windows = [np.array([0, 0, 0, 1]), np.array([1, 0])]
    found = measured(bundle, windows, reference)
    assert found.perplexity == pytest.approx((0.75 * 0.75 * 0.25 * 0.25) ** (-1 / 4))
    assert found.reference_perplexity == pytest.approx(2)
    assert found.kl_divergence == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), rel=1e-6)
    assert found.top1_agreement == pytest.approx(4 / 6)  # an undecided one takes the first token
    assert (found.tokens, found.windows, found.length) == (6, 2, 4)
    assert (found.bundle, found.reference) == ("a", "b")


def test_long_windows_lose_no_position() -> None:
    """Probabilities are taken some rows at a time."""
    for length in (64, 65, 128, 129, 200):
        ids = np.random.default_rng(length).integers(0, 2, length)
        same = ids[1:] == ids[:-1]
        found = measured(Fake("a", certain_of_the_same, [1]), [ids], Fake("b", undecided, [1]))
        assert found.perplexity == pytest.approx(math.exp(-np.log(np.where(same, 0.75, 0.25)).mean()))
        assert found.top1_agreement == pytest.approx((ids == 0).mean())
        assert found.kl_divergence == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)


def test_greedy_agreement_counts_nothing_after_the_first_difference() -> None:
    bundle = Fake("a", undecided, range(32))
    reference = Fake("b", undecided, [*range(8), 99, *range(9, 32)])
    found = measured(bundle, [np.zeros(80, np.int64)] * 20, reference)
    assert found.greedy_agreement == 8 / 32
    assert bundle.asked == [(32, 32)] * 16


def test_greedy_continuations_stay_within_the_longest_window() -> None:
    bundle = Fake("a", undecided, range(32))
    windows = [np.zeros(10, np.int64), np.zeros(3, np.int64)]
    assert measured(bundle, windows, bundle).greedy_agreement == 1
    assert bundle.asked == [(5, 6), (1, 10)]  # the last token is not fed


def test_without_a_reference_its_figures_are_none_and_nothing_is_written() -> None:
    bundle = Fake("a", undecided, [])
    found = measured(bundle, [np.array([0, 1, 1])])
    assert found.to_json() == {
        "perplexity": pytest.approx(2), "kl_divergence": None, "top1_agreement": None, "greedy_agreement": None,
        "reference_perplexity": None, "tokens": 3, "windows": 1, "length": 3, "bundle": "a", "reference": None,
    }  # fmt: skip
    assert bundle.asked == []


def test_the_logits_of_no_two_windows_are_held() -> None:
    held: list[weakref.ref[np.ndarray]] = []

    def watched(ids: np.ndarray) -> np.ndarray:
        assert sum(made() is not None for made in held) <= 1  # at most the other model's of this window
        logits = undecided(ids)
        held.append(weakref.ref(logits))
        return logits

    bundle, reference = Fake("a", watched, [1]), Fake("b", watched, [1])
    measured(bundle, [np.zeros(200, np.int64)] * 3, reference)
    assert len(held) == 6


def test_progress_is_given_the_windows_of_each_part() -> None:
    seen: list[tuple[str, int]] = []

    def progress(windows: Sequence[np.ndarray], what: str) -> Sequence[np.ndarray]:
        seen.append((what, len(windows)))
        return windows

    bundle = Fake("a", undecided, range(32))
    measured(bundle, [np.zeros(4, np.int64)] * 20, bundle, progress=progress)
    assert seen == [("predict", 20), ("continue", 16)]


# --- bundles ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def windows() -> list[np.ndarray]:
    """Of a context of 40 and a vocabulary of 61, the last one shorter."""
    return cut_windows(np.random.default_rng(0).integers(0, 61, 150).tolist(), 40, 9)


def test_perplexity_is_the_exponential_of_torchs_cross_entropy(exported: Any, windows: list[np.ndarray]) -> None:
    llama = exported("llama")
    losses = torch.cat(
        [
            torch.nn.functional.cross_entropy(
                torch.from_numpy(llama.torch_logits(ids.tolist())[:-1]), torch.from_numpy(ids[1:]), reduction="none"
            )
            for ids in windows
        ]
    )
    assert len(losses) == 150 - 4
    expected = math.exp(float(losses.double().mean()))
    found = evaluate(BundlePredictions(llama.bundle), windows, ModulePredictions(llama.module, "llama"))
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert found.reference_perplexity == pytest.approx(expected, rel=1e-5)
    assert found.kl_divergence == pytest.approx(0, abs=1e-9)
    assert (found.top1_agreement, found.greedy_agreement) == (1, 1)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_bundle_is_its_own_perfect_reference(exported: Any, windows: list[np.ndarray], precision: str) -> None:
    bundle = exported("llama", precision).bundle
    found = evaluate(BundlePredictions(bundle), windows, BundlePredictions(bundle))
    assert found.kl_divergence == 0
    assert (found.top1_agreement, found.greedy_agreement) == (1, 1)
    assert found.reference_perplexity == found.perplexity


def test_int8_is_measurably_away_from_its_source(exported: Any, windows: list[np.ndarray]) -> None:
    llama = exported("llama", "int8")
    module = ModulePredictions(llama.module, "llama")
    found = evaluate(BundlePredictions(llama.bundle), windows, module)
    own = BundlePredictions(llama.bundle)
    pairs = [(module.logits(ids), own.logits(ids)) for ids in windows]
    expected, logits = (np.concatenate(side) for side in zip(*pairs, strict=True))
    assert found.kl_divergence == pytest.approx(kl_divergence(expected, logits), rel=1e-9)
    assert found.top1_agreement == top1_agreement(expected, logits)
    assert found.kl_divergence is not None
    assert 1e-6 < found.kl_divergence < 0.05


def test_a_modules_greedy_continuation_is_told_by_one_run(exported: Any) -> None:
    llama = exported("llama")
    prompt = np.array([3, 1, 4, 1, 5])
    written = prompt.tolist()
    for _ in range(8):  # the slow obvious way
        written.append(int(llama.torch_logits(written)[-1].argmax()))
    own = written[len(prompt) :]
    module = ModulePredictions(llama.module, "llama")
    assert module.agreeing(prompt, own) == 8
    assert module.agreeing(prompt, [*own[:3], (own[3] + 1) % 61, *own[4:]]) == 3
    assert BundlePredictions(llama.bundle).greedy(prompt, 8) == own

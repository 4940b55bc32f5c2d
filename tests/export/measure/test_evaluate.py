"""How well a model predicts a text, and how far it is from a reference, against the figures' definitions."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from pastkey.export.measure.evaluate import evaluate
from pastkey.export.measure.metrics import agreeing_tokens


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


def test_figures_of_known_odds_over_windows_of_different_lengths():
    bundle, reference = Fake("a", certain_of_the_same, [1, 1]), Fake("b", undecided, [1, 1])
    windows = [np.array([0, 0, 0, 1]), np.array([1, 0])]
    found = evaluate(bundle, windows, reference)
    assert found.perplexity == pytest.approx((0.75 * 0.75 * 0.25 * 0.25) ** (-1 / 4))
    assert found.reference_perplexity == pytest.approx(2)
    assert found.kl_divergence == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), rel=1e-6)
    assert found.top1_agreement == pytest.approx(4 / 6)  # an undecided one takes the first token
    assert (found.tokens, found.windows, found.length) == (6, 2, 4)
    assert (found.bundle, found.reference) == ("a", "b")


def test_long_windows_lose_no_position():
    """Probabilities are taken some rows at a time."""
    for length in (64, 65, 128, 129, 200):
        ids = np.random.default_rng(length).integers(0, 2, length)
        same = ids[1:] == ids[:-1]
        found = evaluate(Fake("a", certain_of_the_same, [1]), [ids], Fake("b", undecided, [1]))
        assert found.perplexity == pytest.approx(math.exp(-np.log(np.where(same, 0.75, 0.25)).mean()))
        assert found.top1_agreement == pytest.approx((ids == 0).mean())
        assert found.kl_divergence == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)


def test_greedy_agreement_counts_nothing_after_the_first_difference_nor_behind_the_longest_window():
    bundle = Fake("a", undecided, range(32))
    reference = Fake("b", undecided, [*range(8), 99, *range(9, 32)])
    found = evaluate(bundle, [np.zeros(80, np.int64)] * 20, reference)
    assert found.greedy_agreement == 8 / 32
    assert bundle.asked == [(32, 32)] * 16
    bundle.asked.clear()  # continuations stay within the longest window
    windows = [np.zeros(10, np.int64), np.zeros(3, np.int64)]
    assert evaluate(bundle, windows, bundle).greedy_agreement == 1
    assert bundle.asked == [(5, 6), (1, 10)]  # the last token is not fed


def test_without_a_reference_its_figures_are_none_and_nothing_is_written():
    bundle = Fake("a", undecided, [])
    found = evaluate(bundle, [np.array([0, 1, 1])])
    assert found.to_json() == {
        "perplexity": pytest.approx(2), "kl_divergence": None, "top1_agreement": None, "greedy_agreement": None,
        "reference_perplexity": None, "tokens": 3, "windows": 1, "length": 3, "bundle": "a", "reference": None,
    }  # fmt: skip
    assert bundle.asked == []


def test_the_logits_of_no_two_windows_are_held():
    held: list[weakref.ref[np.ndarray]] = []

    def watched(ids: np.ndarray) -> np.ndarray:
        assert sum(made() is not None for made in held) <= 1  # at most the other model's of this window
        logits = undecided(ids)
        held.append(weakref.ref(logits))
        return logits

    bundle, reference = Fake("a", watched, [1]), Fake("b", watched, [1])
    evaluate(bundle, [np.zeros(200, np.int64)] * 3, reference)
    assert len(held) == 6

"""The figures of how well a model predicts, and how far two are apart, against their definitions."""

from __future__ import annotations

import dataclasses
import json
import math
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pastkey.errors import NumericsError, ParityError
from pastkey.export.measure import metrics
from pastkey.export.measure.evaluate import evaluate
from pastkey.export.measure.metrics import kl_by_position, kl_divergence, log_softmax, softmax, top1_agreement
from pastkey.export.measure.texts import cut_windows, encode_file, self_generated_texts, start_token
from pastkey.export.measure.verification import Check, Verification
from pastkey.runtime import Engine
from pastkey.runtime.text.codec import TextCodec

LOGITS = arrays(np.float32, (3, 5), elements=st.floats(-50, 50, width=32))


def test_log_softmax_of_known_odds_does_not_overflow():
    found = log_softmax(np.log(np.array([[1, 3]], np.float32)))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [[math.log(0.25), math.log(0.75)]], rtol=1e-6)
    np.testing.assert_allclose(log_softmax(np.array([[1e30, 0.0]], np.float32)), [[0.0, -1e30]])


@given(LOGITS, LOGITS, st.floats(-20, 20))
def test_kl_divergence_is_not_negative_and_knows_no_constant(a, b, shift):
    assert kl_divergence(a, b) >= 0
    assert kl_divergence(a, a) == 0
    assert kl_divergence(a, a + np.float32(shift)) == pytest.approx(0, abs=1e-5)


def test_top1_agreement_is_a_share_of_positions():
    a = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    b = np.array([[1, 0], [0, 1], [0, 1], [0, 2]], np.float32)
    assert top1_agreement(a, b) == 0.75


def test_perplexity_of_an_even_choice_is_the_number_of_choices():
    assert metrics.perplexity(math.log(61)) == pytest.approx(61)
    with pytest.raises(NumericsError, match="loses 1e\\+03 nats per token"):
        metrics.perplexity(1e3)


def test_agreeing_tokens_are_those_before_the_first_difference():
    asked = iter([1, 2, 9, 4])
    assert metrics.agreeing_tokens(asked, [1, 2, 3, 4]) == 2
    assert next(asked) == 4  # nothing was asked for after it
    assert metrics.agreeing_tokens([1, 2], [1, 2]) == 2


# --- the one KL ---------------------------------------------------------------------------------------------------
def exactly(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL by its definition, in extended precision."""
    p, q = (x.astype(np.longdouble) - x.max(-1, keepdims=True) for x in (reference, logits))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(-1).astype(np.float64)


@pytest.mark.parametrize("vocabulary", [61, 5000])
@pytest.mark.parametrize("noise", [1e-4, 1e-2, 1, 10])
def test_kl_of_any_axes_is_exact_to_a_millionth_however_small_or_large(vocabulary, noise):
    rng = np.random.default_rng(0)
    reference = (3 * rng.normal(size=(2, 10, vocabulary))).astype(np.float32)
    logits = (reference + noise * rng.normal(size=reference.shape)).astype(np.float32)
    for array in (reference, logits):
        array.flags.writeable = False
    found = kl_by_position(reference, softmax(reference), logits)
    np.testing.assert_allclose(found, exactly(reference, logits), rtol=2e-6)


def test_kl_of_predictions_with_nothing_in_common_is_their_distance_and_of_nan_nan():
    """A probability of e^-200 is no float32. No limit lets NaN pass."""
    reference, logits = np.array([[100.0, -100.0]], np.float32), np.array([[-100.0, 100.0]], np.float32)
    assert kl_divergence(reference, logits) == pytest.approx(200, rel=1e-9)
    assert kl_divergence(reference, 100 * logits) == pytest.approx(20000, rel=1e-9)
    assert math.isnan(kl_divergence(reference, np.full_like(logits, np.nan)))


def test_sums_of_windows_are_those_of_all_positions_together():
    rng = np.random.default_rng(0)
    ids, lengths = [rng.integers(0, 7, length) for length in (130, 64, 3)], (130, 64, 3)
    logits, expected = ([rng.normal(size=(n, 7)).astype(np.float32) for n in lengths] for _ in range(2))
    sums = metrics.Sums()
    for window in zip(ids, logits, expected, strict=True):
        sums.add(*window)
    both = np.concatenate(expected), np.concatenate(logits)
    assert (sums.tokens, sums.predicted) == (197, 194)
    assert sums.kl / sums.tokens == pytest.approx(kl_divergence(*both), rel=1e-12)
    assert sums.same_top / sums.tokens == top1_agreement(*both)
    for total, windows in ((sums.loss, logits), (sums.reference_loss, expected)):
        losses = [-log_softmax(w)[np.arange(len(i) - 1), i[1:]].sum() for w, i in zip(windows, ids, strict=True)]
        assert total == pytest.approx(sum(losses), rel=1e-12)


# --- what a verification says of itself -------------------------------------------------------------------------------
def test_a_verification_is_the_same_after_json():
    greedy = Check("greedy", True, "first_difference", None, None, "why")
    checks = (Check("prefill", True, "mean_kl", 0.25, 0.5), greedy)
    made = Verification("source", 7, checks, {"kl_divergence": 0.125})
    assert Verification.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_the_first_check_that_failed_is_told():
    checks = tuple(Check(name, ok, "mean_kl", 1.0, 0.5, name) for name, ok in (("a", True), ("b", False), ("c", False)))
    verification = Verification("source", 7, checks, {})
    assert not verification.ok
    with pytest.raises(ParityError, match=r"^the bundle does not compute what its source computes: b$"):
        verification.require_ok("the bundle")


# --- texts to measure on: windows of a file, and those that a model writes --------------------------------------------
@pytest.mark.parametrize(
    ("count", "length", "most", "expected"),
    [
        (10, 4, 9, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),
        (9, 4, 9, [[0, 1, 2, 3], [4, 5, 6, 7]]),  # a single token has nothing to be predicted from
        (10, 4, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_windows_follow_one_another_from_the_beginning(count, length, most, expected):
    found = cut_windows(range(count), length, most)
    assert [window.tolist() for window in found] == expected
    assert {window.dtype for window in found} == {np.dtype(np.int64)}


def test_a_file_is_encoded_as_a_whole_without_its_byte_order_mark(word_tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbfw3 w1\nw4 w1 w5")
    assert encode_file(file, TextCodec(word_tokenizer)) == [3, 1, 4, 1, 5]


@pytest.mark.parametrize(("bos", "eos", "expected"), [(3, (5,), 3), (None, (5, 4), 5), (None, (), 0), (99, (), 60)])
def test_a_text_begins_with_bos_or_eos_or_the_first_token(bos, eos, expected, exported):
    manifest = exported("llama").bundle.manifest  # of 61 tokens
    assert start_token(dataclasses.replace(manifest, bos_token_id=bos, eos_token_ids=eos)) == expected


@pytest.mark.parametrize("beginning", [7, [7, 3, 9]])
def test_a_model_writes_what_the_slow_obvious_way_draws(beginning, exported):
    """The same ids for the same seed, on which int8 is calibrated."""
    made = exported("llama")
    found = self_generated_texts(Engine(made.bundle), beginning, 5, 12, batch=2, seed=4)
    rng, expected = np.random.default_rng(4), list[list[int]]()
    for rows in (2, 2, 1):
        texts = [np.atleast_1d(beginning).tolist() for _ in range(rows)]
        while len(texts[0]) < 12:
            logits = np.stack([made.torch_logits(text)[-1] for text in texts])
            chosen = (logits + rng.gumbel(size=logits.shape)).argmax(-1)
            texts = [[*text, int(token)] for text, token in zip(texts, chosen, strict=True)]
        expected += texts
    assert [text.tolist() for text in found] == expected
    assert {text.dtype for text in found} == {np.dtype(np.int64)}


# --- how well a model predicts a text, and how far it is from a reference ---------------------------------------------
class Fake:
    """Logits of ids by a function, and a greedy continuation that is always the same."""

    def __init__(self, name: str, logits: Callable[[np.ndarray], np.ndarray], continuation: Sequence[int]) -> None:
        self.name, self.logits, self.continuation = name, logits, list(continuation)
        self.asked: list[tuple[int, int]] = []  # tokens of a prompt, and of its continuation

    def greedy(self, prompt: np.ndarray, count: int) -> list[int]:
        self.asked.append((prompt.size, count))
        return self.continuation[:count]


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
    assert found.top1_agreement == pytest.approx(4 / 6)  # an undecided one chooses the first token
    assert (found.tokens, found.windows, found.length) == (6, 2, 4)
    assert (found.bundle, found.reference) == ("a", "b")


def test_greedy_agreement_counts_nothing_after_the_first_difference_nor_behind_the_longest_window():
    bundle = Fake("a", undecided, [*[0] * 8, 1, *[0] * 23])  # an undecided one chooses the first token
    reference = Fake("b", undecided, [])
    found = evaluate(bundle, [np.zeros(80, np.int64)] * 20, reference)
    assert found.greedy_agreement == 8 / 32
    assert bundle.asked == [(32, 32)] * 16
    bundle.asked.clear()  # continuations stay within the longest window
    bundle.continuation = [0] * 10
    windows = [np.zeros(10, np.int64), np.zeros(3, np.int64)]
    assert evaluate(bundle, windows, reference).greedy_agreement == 1
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
    assert len(held) == 3 * 3  # two models, and the reference on a continuation

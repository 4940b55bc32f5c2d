"""transformers' logits processors as a live oracle: each stage, and all of them in transformers' own order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pastkey.runtime.sampling import bans, penalties, truncation
from pastkey.runtime.sampling.sampler import Sampler, _changes, _Text, _truncations
from pastkey.runtime.settings import SamplingConfig

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("transformers.generation.logits_process")

SIZE = 12
# Ties, bans, far and near.
logit_arrays = arrays(np.float32, SIZE, elements=st.sampled_from([-np.inf, -7.5, -1.0, 0.0, 0.25, 0.25, 1.5, 3.0]))
spread = arrays(np.float32, st.integers(1, 60), elements=st.floats(-20, 20, width=32))
id_lists = st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=20)


def apply(processor: Any, ids: list[int], logits: np.ndarray) -> np.ndarray:
    found = processor(torch.tensor([ids]), torch.from_numpy(logits.astype(np.float64)[None].copy()))
    return np.asarray(found[0].numpy())


def same(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    left = np.isfinite(expected)
    np.testing.assert_allclose(found[left], expected[left], rtol=1e-6, atol=1e-6)


def some_left(logits: np.ndarray) -> np.ndarray:
    if np.isneginf(logits).all():
        logits[0] = 0.5
    return logits


@given(logits=logit_arrays, ids=id_lists, penalty=st.sampled_from([0.5, 1.25, 3.0]))
def test_repetition_penalty(logits, ids, penalty):
    expected = apply(theirs.RepetitionPenaltyLogitsProcessor(penalty), ids, logits)
    same(penalties.apply_repetition_penalty(logits, ids, penalty), expected)


@given(logits=logit_arrays, ids=id_lists, size=st.integers(1, 5))
def test_no_repeat_ngram_size(logits, ids, size):
    expected = apply(theirs.NoRepeatNGramLogitsProcessor(size), ids, logits)
    same(penalties.ban_repeated_ngrams(logits, ids, size), expected)


@given(
    logits=logit_arrays,
    ids=id_lists,
    words=st.lists(st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=3), min_size=1, max_size=6),
)
def test_bad_words_ids(logits, ids, words):
    if all(word == [3] for word in words):
        words.append([5, 6])
    expected = apply(theirs.NoBadWordsLogitsProcessor(words, eos_token_id=[3]), ids, logits)
    same(bans.ban_bad_words(logits, ids, bans.bad_words(words, {3})), expected)


@given(logits=logit_arrays, bias=st.dictionaries(st.integers(0, SIZE - 1), st.sampled_from([-1.5, 4.0]), min_size=1))
def test_logit_bias(logits, bias):
    processor = theirs.SequenceBiasLogitsProcessor({(token,): number for token, number in bias.items()})
    same(bans.add_bias(logits, bias), apply(processor, [0], logits))


@given(logits=logit_arrays, tokens=st.lists(st.integers(0, SIZE - 1), max_size=5))
def test_suppress_tokens(logits, tokens):
    same(bans.suppress(logits, tokens), apply(theirs.SuppressTokensLogitsProcessor(tokens), [0], logits))


@given(logits=logit_arrays | spread, k=st.integers(1, 70))
def test_top_k(logits, k):
    logits = some_left(logits)
    same(truncation.keep_top_k(logits, k), apply(theirs.TopKLogitsWarper(k), [0], logits))


def near(logits: np.ndarray, p: float) -> bool:
    """Whether p is so near to a sum of probabilities that rounding decides."""
    sums = np.cumsum(np.sort(truncation.softmax(logits))[::-1])
    return bool((np.abs(sums - p) < 1e-6).any())


@given(logits=logit_arrays | spread, p=st.floats(0.01, 0.999))
def test_top_p(logits, p):
    logits = some_left(logits)
    found = truncation.keep_top_p(logits, p)
    expected = apply(theirs.TopPLogitsWarper(p), [0], logits)
    if near(logits, p):
        return
    # Of tokens with equal logits at the boundary each keeps as many, and pastkey the first ones.
    np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=1e-6)


@given(logits=logit_arrays | spread, p=st.floats(0.01, 1.0))
def test_min_p(logits, p):
    logits = some_left(logits)
    shares = truncation.softmax(logits) / truncation.softmax(logits).max()
    if (np.abs(shares - p) < 1e-9).any():
        return
    same(truncation.keep_min_p(logits, p), apply(theirs.MinPLogitsWarper(p), [0], logits))


@given(logits=logit_arrays | spread, p=st.floats(0.01, 0.999))
def test_typical_p(logits, p):
    logits = some_left(logits)
    probabilities = truncation.softmax(logits)
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.abs(-np.log(probabilities) - np.nansum(-probabilities * np.log(probabilities)))
    order = np.argsort(distance, kind="stable")
    sums, gaps = np.cumsum(probabilities[order]), np.diff(np.sort(distance[np.isfinite(distance)]))
    if (np.abs(sums - p) < 1e-6).any() or ((gaps > 0) & (gaps < 1e-6)).any():
        return
    same(truncation.keep_typical(logits, p), apply(theirs.TypicalLogitsWarper(p), [0], logits))


@given(logits=logit_arrays, ids=st.lists(st.integers(0, SIZE - 1), min_size=4, max_size=9), least=st.integers(1, 6))
def test_min_new_tokens(logits, ids, least):
    processor = theirs.MinNewTokensLengthLogitsProcessor(4, least, [2, 5])
    (change,) = _changes(SamplingConfig(min_new_tokens=least), _Text(4, None, frozenset({2, 5}), {}))
    same(change(logits, np.array(ids)), apply(processor, ids, logits))


@given(logits=logit_arrays, ids=st.lists(st.integers(0, SIZE - 1), min_size=4, max_size=9))
def test_forced_eos_token_id(logits, ids):
    processor = theirs.ForcedEOSTokenLogitsProcessor(7, 2)
    (change,) = _changes(SamplingConfig(forced_eos_token_id=2), _Text(4, 3, frozenset({2}), {}))
    same(change(logits, np.array(ids)), apply(processor, ids, logits))


WHOLE: dict[str, Any] = {
    "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[3], [1, 2]], "min_new_tokens": 6,
    "suppress_tokens": [0], "temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.95,
}  # fmt: skip


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    ids=st.lists(st.integers(0, SIZE - 1), min_size=4, max_size=20),
    names=st.sets(st.sampled_from(sorted(WHOLE))),
)
def test_the_order_is_that_of_generate(seed, ids, names):
    """Every subset of the settings, as `generate` of transformers lists their processors."""
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMixin

    logits = np.random.default_rng(seed).normal(0, 2, SIZE).astype(np.float32)
    given = {name: WHOLE[name] for name in names}
    config = GenerationConfig(do_sample=True, **{"top_k": 0, **given})
    config._eos_token_tensor = torch.tensor([5])
    model = type("Model", (GenerationMixin,), {"config": type("Config", (), {"is_encoder_decoder": False})()})()
    processors = model._get_logits_processor(config, input_ids_seq_length=4, device="cpu")
    assert len(processors) == len(names)
    expected = processors(torch.tensor([ids]), torch.from_numpy(logits.astype(np.float64)[None]))[0].softmax(-1)

    ours = SamplingConfig(**{"temperature": 1.0, **given})
    found: np.ndarray = logits
    for change in _changes(ours, _Text(4, None, frozenset({5}), {})):
        found = change(found, np.array(ids))
    if np.isneginf(found).all():
        assert bool(expected.isnan().all())
        return
    found = truncation.apply_temperature(found, ours.temperature)
    for _, truncate in _truncations(ours):
        found = truncate(found)
    np.testing.assert_allclose(truncation.softmax(found), expected.numpy(), atol=2e-6)


def test_greedy_takes_what_is_left():
    sampler = Sampler(SamplingConfig(suppress_tokens=[2], min_new_tokens=1), prompt_tokens=1, end_ids=[1])
    assert sampler(np.array([0, 2, 3, 1], np.float32), [0]) == 3

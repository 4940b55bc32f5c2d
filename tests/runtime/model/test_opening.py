"""The effect of a call's options on its text, the other results, and the score of a text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pastkey.errors import InputError, ResourceError
from pastkey.runtime import Completion, LanguageModel, TextPrompt, load
from pastkey.runtime.decoding.completion import completed
from pastkey.runtime.engine import decoder_graph

from ..conftest import DRAWN, log_softmax, metaspace


@pytest.fixture(scope="module")
def mute(tiny, make_bundle):
    return load(make_bundle(tiny, "fused").path, threads=1)


# --- what comes back ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.5, "top_k": 3, "seed": 2}, {"suppress_tokens": [1, 2], "prompt_lookup": False}]
)
def test_log_probabilities_are_the_models_own_whatever_the_settings(model, tiny, settings):
    prompt = [5, 6, 7, 9, 5, 6]
    found = model.generate(prompt, max_new_tokens=20, logprobs=3, prompt_logprobs=True, **settings)
    plain = model.generate(prompt, max_new_tokens=20, **settings)
    assert (found.ids, plain.logprobs, plain.prompt_logprobs) == (plain.ids, [], [])
    text = [*prompt, *found.ids]
    assert found.prompt_logprobs[0] is None
    every = [*found.prompt_logprobs[1:], *found.logprobs]
    for expected, entry, token in zip(log_softmax(tiny(text[:-1])), every, text[1:], strict=True):
        assert entry.id == token
        assert entry.logprob == pytest.approx(expected[token], abs=1e-4)
        best = np.argsort(-expected, kind="stable")[:3]
        assert [i for i, _ in entry.top] == best.tolist()
        np.testing.assert_allclose([p for _, p in entry.top], expected[best], atol=1e-4)


def test_a_chunk_has_those_of_its_token(lm):
    stream = lm.stream("abc", logprobs=0, **DRAWN)
    chunks = list(stream)
    entries = [entry for chunk in chunks for entry in chunk.logprobs]
    assert entries == stream.completion.logprobs
    assert [entry.id for entry in entries] == [token for chunk in chunks for token in chunk.ids]
    assert all(entry.top == [] for entry in entries)
    assert all(chunk.logprobs == [] for chunk in lm.stream("abc", **DRAWN))


SETTINGS: list[dict[str, Any]] = [
    {"max_new_tokens": 30},
    {
        "temperature": 1.0, "seed": 3, "dry_multiplier": 0.5, "presence_penalty": 0.3, "min_new_tokens": 5,
        "xtc_probability": 0.4, "xtc_threshold": 0.05, "typical_p": 0.9, "max_new_tokens": 30,
    },
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
def test_drafts_and_rows_decoded_together_meet_the_same_settings_and_logits(lm, settings):
    prompts = ["abcabcabc", "aaaa", "cabcab"]
    alone = [lm.generate(prompt, prompt_lookup=False, logprobs=1, **settings) for prompt in prompts]
    together = lm.generate(prompts, prompt_lookup=False, logprobs=1, **settings)
    drafted = [lm.generate(prompt, logprobs=1, **settings) for prompt in prompts]
    assert max(completion.accepted_tokens for completion in drafted) > 0
    for one, *others in zip(alone, together, drafted, strict=True):
        expected = [entry.logprob for entry in one.logprobs]
        for found in others:
            assert [entry.id for entry in found.logprobs] == found.ids == one.ids
            np.testing.assert_allclose([entry.logprob for entry in found.logprobs], expected, atol=1e-4)
    with lm.session() as session:
        session.append(prompts[0])
        assert session.generate(**settings).ids == alone[0].ids


def test_a_prompt_that_is_cached_is_computed_anew_for_its_log_probabilities(lm):
    first = lm.generate("abcabc", reuse_prefix=True, **DRAWN)
    again = lm.generate("abcabc", reuse_prefix=True, prompt_logprobs=True, **DRAWN)
    assert (again.ids, again.cached_tokens) == (first.ids, 0)
    assert None not in again.prompt_logprobs[1:]


@pytest.mark.parametrize("length", [1, 2, 17])
def test_a_prompt_has_log_probabilities_without_new_tokens(model, length):
    prompt = [i % 7 for i in range(length)]
    found = model.generate(prompt, max_new_tokens=0, prompt_logprobs=True)
    assert found.prompt_logprobs == model.generate(prompt, max_new_tokens=1, prompt_logprobs=True).prompt_logprobs
    assert (found.ids, found.logprobs, found.finish_reason) == ([], [], "length")


def test_the_figures(lm):
    found = lm.generate("abcabcabc", max_new_tokens=100)
    assert 0 < found.accepted_tokens <= found.draft_tokens
    assert found.seconds_per_token == found.decode_seconds / 99
    assert lm.generate("abc", max_new_tokens=1).seconds_per_token == 0


# --- settings of the sampler ----------------------------------------------------------------------------------------
def texts(lm: LanguageModel, **settings: Any) -> Completion:
    return lm.generate("abcabcabc", max_new_tokens=40, **settings)


def test_a_prompt_that_is_encoded_once_goes_on_as_its_text_does(tiny, make_bundle):
    given: dict[str, Any] = {"forced_decoder_ids": [(0, 9), (1, 0)], "max_new_tokens": 2}
    with load(make_bundle(tiny, tokenizer=metaspace()).path, threads=1) as lm:
        ids = lm.prompt_ids("a cab")
        prompts = [TextPrompt(ids, "a cab"), TextPrompt(ids)]
        assert [found.text for found in completed(lm.stream_many(prompts, **given))] == [" a", "a"]
        assert lm.generate("a cab", **given).text == " a"


def test_bad_words_as_texts(lm):
    plain = texts(lm)
    letter = next(letter for letter in plain.text if letter.strip())
    found = texts(lm, bad_words=[letter])
    assert letter not in found.text
    assert found.ids == texts(lm, bad_words_ids=[lm.tokenizer.encode(letter, add_special_tokens=False)]).ids
    pair = plain.text.strip()[:2]
    assert pair not in texts(lm, bad_words=[pair]).text
    with pytest.raises(InputError, match="the settings ban every token"):
        texts(lm, suppress_tokens=range(37))


@pytest.mark.parametrize(
    ("options", "reason", "count"),
    [
        ({"forced_eos_token_id": 3, "suppress_tokens": []}, "stop", 4),
        ({"forced_decoder_ids": [(0, 3)]}, "stop", 0),
        ({"min_new_tokens": 5, "logit_bias": {3: 100.0}}, "length", 5),
        ({"min_new_tokens": 2, "logit_bias": {3: 100.0}}, "stop", 2),
    ],
)
def test_the_end_comes_where_it_is_asked_for(ending, options, reason, count):
    found = ending.generate("abc", max_new_tokens=5, **options)
    assert (found.finish_reason, found.new_tokens) == (reason, count)


@pytest.fixture(scope="module")
def ending(tiny, letters, make_bundle):
    """A model whose texts end with d."""
    return load(make_bundle(tiny, "fused", tokenizer=letters, eos_token_ids=[3]).path, threads=1)


def test_a_function_of_ones_own_sees_the_text_as_it_grows(lm):
    seen: list[list[int]] = []

    def processor(ids: Any, logits: Any) -> Any:
        seen.append(ids.tolist())
        logits[ids[-1]] = -np.inf  # never the same twice in a row
        return logits

    found = lm.generate("aa", max_new_tokens=20, logits_processor=processor)
    ids = [*lm.prompt_ids("aa"), *found.ids]
    assert all(one != other for one, other in zip(ids[-20:], ids[-21:-1], strict=True))
    assert seen == [ids[:length] for length in range(2, 22)]


def test_breakers_are_texts_or_ids(lm, mute):
    settings: dict[str, Any] = {"dry_multiplier": 5.0, "dry_allowed_length": 1, "max_new_tokens": 40}
    prompt = lm.prompt_ids("abcabcabc")
    plain = lm.generate(prompt, dry_sequence_breakers=[], **settings)
    often = max(plain.text, key=plain.text.count)  # penalised without a break
    (letter,) = lm.tokenizer.encode(often, add_special_tokens=False)
    by_text = lm.generate(prompt, dry_sequence_breakers=[often], **settings)
    assert by_text.ids != plain.ids
    for model in (lm, mute):
        assert model.generate(prompt, dry_sequence_breakers=[[letter]], **settings).ids == by_text.ids
    assert mute.generate(prompt, **settings).ids == lm.generate(prompt, **settings).ids


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9; it must be at most max"),
    ({"suppress_tokens": [999]}, "suppress_tokens holds 999"),
    ({"eos_token_id": 37}, "eos_token_id is .*must be a .*token id"),
    ({"stop_token_ids": [37]}, "stop_token_ids is .*must be a .*token id"),
    ({"draft": True}, "draft is True, and this model has no draft model"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_options_out_of_range_are_named_before_the_first_token(lm, options, words):
    with pytest.raises(InputError, match=words):
        lm.stream("abc", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bad_words": ["a"]}, "bad words have no ids"),
        ({"dry_multiplier": 5.0, "dry_sequence_breakers": ["a"]}, "dry_sequence_breakers have no ids"),
        ({"stop": ["a"]}, "no tokenizer"),
    ],
)
def test_what_needs_a_tokenizer_is_refused_without_one(mute, options, words):
    with pytest.raises(InputError, match=words):
        mute.generate([5, 6], **options)
    with pytest.raises(InputError, match="no tokenizer: give the prompt as token ids"):
        mute.generate("a")


# --- the score of a text ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [4, 512])
def test_a_score_is_the_log_softmax_of_each_token_after_those_before_it(model, tiny, monkeypatch, chunk):
    monkeypatch.setattr(decoder_graph, "PREFILL_CHUNK", chunk)
    ids = [5, 6, 7, 9, 11, 5, 6, 7, 3, 4]
    found = model.score(ids)
    assert (found.ids, found.logprobs[0]) == (ids, None)
    np.testing.assert_allclose(found.logprobs[1:], log_softmax(tiny(ids))[np.arange(9), ids[1:]], atol=1e-4)
    assert found.total == pytest.approx(sum(found.logprobs[1:]))
    assert found.mean == found.total / 9


def test_what_is_scored_and_what_cannot_be(lm):
    assert lm.score("abc") == lm.score(lm.prompt_ids("abc"))
    assert (lm.score([5]).logprobs, lm.score([5]).total, lm.score([5]).mean) == ([None], 0.0, 0.0)
    for ids, words in (([5] * 601, "the context is"), ([999], "token id 999")):
        with pytest.raises(InputError, match=words):
            lm.score(ids)


def test_a_score_keeps_the_memory_limit(speaking_bundle, lm):
    with load(speaking_bundle.path, threads=1, max_memory=lm.memory.estimate(10)) as limited:
        for _ in range(2):  # nothing stays promised
            assert len(limited.score([5] * 10).logprobs) == len(limited.logits([5] * 10)) == 10
        for call in (limited.score, limited.logits):
            with pytest.raises(ResourceError, match="the cache of 11 tokens needs"):
                call([5] * 11)
        holds = limited.session()
        holds.append([5] * 6)
        with pytest.raises(ResourceError, match="and others use"):
            limited.score([5] * 5)

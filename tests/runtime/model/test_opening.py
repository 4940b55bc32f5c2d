"""What a call's options do to its text, what comes back with it, and the score of a text."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pastkey.errors import InputError, ResourceError
from pastkey.runtime import Completion, LanguageModel, TextPrompt, load
from pastkey.runtime.decoding.completion import completed
from pastkey.runtime.engine import decoder_graph

DRAWN: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 1}


@pytest.fixture(scope="module")
def mute(tiny, make_bundle):
    return load(make_bundle(tiny, "fused").path, threads=1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


# --- what comes back ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.5, "top_k": 3, "seed": 2}, {"suppress_tokens": [1, 2], "prompt_lookup": False}]
)
def test_log_probabilities_are_the_models_own_whatever_the_settings(model, tiny, settings):
    prompt = [5, 6, 7, 9, 5, 6]
    found = model.generate(prompt, max_new_tokens=20, logprobs=3, prompt_logprobs=True, **settings)
    plain = model.generate(prompt, max_new_tokens=20, **settings)
    assert (found.ids, plain.logprobs, plain.prompt_logprobs) == (plain.ids, [], [])
    expected = log_softmax(tiny([*prompt, *found.ids]))
    every = [*found.prompt_logprobs[1:], *found.logprobs]
    assert found.prompt_logprobs[0] is None
    assert len(every) == len(prompt) - 1 + 20
    for place, (entry, token) in enumerate(zip(every, [*prompt[1:], *found.ids], strict=True)):
        assert entry is not None
        assert entry.id == token
        assert entry.logprob == pytest.approx(expected[place, token], abs=1e-4)
        assert [i for i, _ in entry.top] == np.argsort(-expected[place], kind="stable")[:3].tolist()
        np.testing.assert_allclose([p for _, p in entry.top], np.sort(expected[place])[::-1][:3], atol=1e-4)


def test_a_chunk_has_those_of_its_token(lm):
    stream = lm.stream("abc", logprobs=0, **DRAWN)
    chunks = list(stream)
    assert stream.completion is not None
    assert [entry for chunk in chunks for entry in chunk.logprobs] == stream.completion.logprobs
    assert all([entry.id for entry in chunk.logprobs] == chunk.ids for chunk in chunks)
    assert all(entry.top == [] for entry in stream.completion.logprobs)
    assert all(chunk.logprobs == [] for chunk in lm.stream("abc", **DRAWN))


def test_those_of_drafts_and_of_rows_decoded_together_are_the_same(lm):
    prompts = ["abcabcabc", "aaaa", "cab"]
    settings: dict[str, Any] = {"max_new_tokens": 30, "logprobs": 1}
    alone = [lm.generate(prompt, prompt_lookup=False, **settings) for prompt in prompts]
    together = lm.generate(prompts, prompt_lookup=False, **settings)
    drafted = [lm.generate(prompt, **settings) for prompt in prompts]
    assert max(completion.accepted_tokens for completion in drafted) > 0
    for one, other, third in zip(alone, together, drafted, strict=True):
        assert one.ids == other.ids == third.ids
        expected = [entry.logprob for entry in one.logprobs]
        for found in (other, third):
            assert [entry.id for entry in found.logprobs] == one.ids
            np.testing.assert_allclose([entry.logprob for entry in found.logprobs], expected, atol=1e-4)


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
    assert found.prefill_seconds > 0
    assert found.seconds_per_token == found.decode_seconds / 99
    assert lm.generate("abc", max_new_tokens=1).seconds_per_token == 0


# --- settings of the sampler ----------------------------------------------------------------------------------------
def texts(lm: LanguageModel, **settings: Any) -> Completion:
    return lm.generate("abcabcabc", max_new_tokens=40, **settings)


def test_no_sequence_comes_twice(lm):
    ids = [*lm.prompt_ids("abca"), *lm.generate("abca", max_new_tokens=30, no_repeat_ngram_size=2).ids]
    pairs = list(itertools.pairwise(ids))
    assert len(set(pairs)) == len(pairs)


def test_drafts_and_rows_meet_the_same_settings(lm):
    settings: dict[str, Any] = {
        "temperature": 1.0, "seed": 3, "dry_multiplier": 0.5, "presence_penalty": 0.3, "min_new_tokens": 5,
        "xtc_probability": 0.4, "xtc_threshold": 0.05, "typical_p": 0.9, "max_new_tokens": 30,
    }  # fmt: skip
    prompts = ["abcabc", "bb", "cabcab"]
    alone = [lm.generate(prompt, prompt_lookup=False, **settings).ids for prompt in prompts]
    assert [completion.ids for completion in lm.generate(prompts, prompt_lookup=False, **settings)] == alone
    assert [lm.generate(prompt, **settings).ids for prompt in prompts] == alone
    with lm.session() as session:
        session.append("abcabc")
        assert session.generate(**settings).ids == alone[0]


def test_a_prompt_that_is_encoded_once_goes_on_as_its_text_does(tiny, make_bundle):
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate("abcdefghi▁")}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    given: dict[str, Any] = {"forced_decoder_ids": [(0, 9), (1, 0)], "max_new_tokens": 2}
    with load(make_bundle(tiny, tokenizer=tokenizer).path, threads=1) as lm:
        ids = lm.prompt_ids("a cab")
        prompts = [TextPrompt(ids, "a cab"), TextPrompt(ids)]
        assert [found.text for found in completed(lm.stream_many(prompts, **given))] == [" a", "a"]
        assert lm.generate("a cab", **given).text == " a"


def test_bad_words_as_texts(lm):
    assert lm.tokenizer is not None
    plain = texts(lm)
    letter = next(letter for letter in plain.text if letter.strip())
    found = texts(lm, bad_words=[letter])
    assert letter not in found.text
    assert found.ids == texts(lm, bad_words_ids=[lm.tokenizer.encode(letter, add_special_tokens=False)]).ids
    pair = plain.text.strip()[:2]
    assert pair in plain.text
    assert pair not in texts(lm, bad_words=[pair]).text
    with pytest.raises(InputError, match="the settings ban every token"):
        texts(lm, suppress_tokens=range(37))


def test_the_end_comes_where_it_is_asked_for(tiny, letters, make_bundle):
    lm = load(make_bundle(tiny, "fused", tokenizer=letters, eos_token_ids=[3]).path, threads=1)
    found = lm.generate("abc", max_new_tokens=5, forced_eos_token_id=3, suppress_tokens=[])
    assert (found.finish_reason, found.new_tokens) == ("stop", 4)
    first = lm.generate("abc", forced_decoder_ids=[(0, 3)])
    assert (first.finish_reason, first.ids) == ("stop", [])
    late = lm.generate("abc", max_new_tokens=5, min_new_tokens=5, logit_bias={3: 100.0})
    assert (late.finish_reason, late.new_tokens) == ("length", 5)
    assert lm.generate("abc", max_new_tokens=5, min_new_tokens=2, logit_bias={3: 100.0}).new_tokens == 2


def test_a_function_of_ones_own_sees_the_text_as_it_grows(lm):
    seen: list[list[int]] = []

    def processor(ids: Any, logits: Any) -> Any:
        seen.append(ids.tolist())
        logits[ids[-1]] = -np.inf  # never the same twice in a row
        return logits

    found = lm.generate("aa", max_new_tokens=20, logits_processor=processor)
    ids = [*lm.prompt_ids("aa"), *found.ids]
    assert all(one != other for one, other in zip(ids[-20:], ids[-21:-1], strict=True))
    assert [len(one) for one in seen] == list(range(2, 22))
    assert all(ids[: len(one)] == one for one in seen)


def test_one_that_fails_ends_its_own_generation_and_no_other(lm):
    def failing(ids: Any, logits: Any) -> Any:
        if len(ids) > 6:
            raise ValueError("enough")
        return logits

    other = lm.stream("abc", **DRAWN)
    next(other)
    bad = lm.stream("abc", logits_processor=failing, **DRAWN)
    with pytest.raises(InputError, match=r"logits_processor .*failing raised ValueError: enough"):
        list(bad)
    list(other)
    assert other.completion is not None
    assert other.completion.ids == lm.generate("abc", **DRAWN).ids
    assert lm.scheduler.live == 0


def test_breakers_are_texts_or_ids(lm, mute):
    assert lm.tokenizer is not None
    settings: dict[str, Any] = {"dry_multiplier": 5.0, "dry_allowed_length": 1}
    plain = texts(lm, dry_sequence_breakers=[], **settings)
    often = max(plain.text, key=plain.text.count)  # penalised without a break
    (letter,) = lm.tokenizer.encode(often, add_special_tokens=False)
    by_text = texts(lm, dry_sequence_breakers=[often], **settings)
    assert by_text.ids == texts(lm, dry_sequence_breakers=[[letter]], **settings).ids
    assert by_text.ids != plain.ids
    prompt = lm.prompt_ids("abcabcabc")
    assert mute.generate(prompt, max_new_tokens=40, dry_sequence_breakers=[[letter]], **settings).ids == by_text.ids
    assert mute.generate(prompt, max_new_tokens=40, **settings).ids == texts(lm, **settings).ids


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "more than there may be": (
        {"min_new_tokens": 9, "max_new_tokens": 8},
        "min_new_tokens is 9; it must be at most max",
    ),
    "no such id": ({"suppress_tokens": [999]}, "suppress_tokens holds 999; token ids are whole numbers from 0 to"),
    "no end": ({"eos_token_id": 37}, "eos_token_id is .*must be a .*token id"),
    "no end of ones own": ({"stop_token_ids": [37]}, "stop_token_ids is .*must be a .*token id"),
    "no draft model": ({"draft": True}, "draft is True, and this model has no draft model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_out_of_range_are_named_before_the_first_token(lm, case):
    options, words = REFUSED[case]
    with pytest.raises(InputError, match=words):
        lm.stream("abc", **options)


def test_what_needs_a_tokenizer_is_refused_without_one(mute):
    for options, words in (
        ({"bad_words": ["a"]}, "this bundle has no tokenizer, so that bad words have no ids"),
        ({"dry_multiplier": 5.0, "dry_sequence_breakers": ["a"]}, "dry_sequence_breakers have no ids: give lists of"),
        ({"stop": ["a"]}, "no tokenizer"),
    ):
        with pytest.raises(InputError, match=words):
            mute.generate([5, 6], **options)


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


def test_what_is_scored_and_what_cannot_be(model):
    assert model.score("abc") == model.score(model.prompt_ids("abc"))
    assert (model.score([5]).logprobs, model.score([5]).total, model.score([5]).mean) == ([None], 0.0, 0.0)
    with pytest.raises(InputError, match="the context is"):
        model.score([5] * (model.manifest.context_length + 1))
    with pytest.raises(InputError, match="token id 999"):
        model.score([999])


def test_a_score_keeps_the_memory_limit(speaking_bundle):
    with load(speaking_bundle.path, threads=1) as free:
        room = free.memory.estimate(10)
    with load(speaking_bundle.path, threads=1, max_memory=room) as limited:
        for ids in ([5] * 10, [5] * 10):  # nothing stays promised
            assert len(limited.score(ids).logprobs) == len(limited.logits(ids)) == 10
        for call in (limited.score, limited.logits):
            with pytest.raises(ResourceError, match="the cache of 11 tokens takes"):
                call([5] * 11)
        holds = limited.session()
        holds.append([5] * 6)
        with pytest.raises(ResourceError, match="and others take"):
            limited.score([5] * 5)

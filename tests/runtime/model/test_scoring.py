"""The score of a text against the decoder in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from pastkey.errors import InputError, ResourceError
from pastkey.runtime import load
from pastkey.runtime.engine import decoder_graph


@pytest.mark.parametrize("chunk", [4, 512])
def test_it_is_the_log_softmax_of_each_token_after_those_before_it(model, tiny, monkeypatch, chunk):
    monkeypatch.setattr(decoder_graph, "PREFILL_CHUNK", chunk)
    ids = [5, 6, 7, 9, 11, 5, 6, 7, 3, 4]
    logits = tiny(ids).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = model.score(ids)
    assert found.ids == ids
    assert found.logprobs[0] is None
    numbers = [number for number in found.logprobs if number is not None]
    np.testing.assert_allclose(numbers, expected[np.arange(9), ids[1:]], atol=1e-4)
    assert found.total == pytest.approx(sum(numbers))


def test_a_text_and_one_token(model):
    assert model.score("abc") == model.score(model.prompt_ids("abc"))
    assert (model.score([5]).logprobs, model.score([5]).total, model.score([5]).mean) == ([None], 0.0, 0.0)
    assert model.score("abc").mean == model.score("abc").total / 2
    prompt = model.generate("abcab", max_new_tokens=1, prompt_logprobs=True).prompt_logprobs
    scored = np.array(model.score("abcab").logprobs[1:], float)
    np.testing.assert_allclose(scored, [entry.logprob for entry in prompt[1:] if entry], atol=1e-5)


def test_what_cannot_be_scored(model):
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
        limited.session().append([5] * 5)
        assert limited.score([5] * 5).ids
        holds = limited.session()
        holds.append([5] * 6)
        with pytest.raises(ResourceError, match="and others take"):
            limited.score([5] * 5)

"""The text is the runtime's, and so is every stage of the sampler."""

from __future__ import annotations

import numpy as np
import pytest

import pastkey
from pastkey.errors import InputError
from pastkey.runtime.sampling.sampler import Sampler
from pastkey.runtime.settings import SamplingConfig
from pastkey.see.text import EXAMPLE, Text, continued, stages


def test_a_text_ends_with_its_end_token_or_with_the_last_that_was_asked_for(classic):
    with pastkey.load(classic / "bundle", "cpu") as lm:
        (end,) = lm.manifest.eos_token_ids
        text = continued(lm, "what is statquest", 9, {})
        completion = lm.generate("what is statquest", max_new_tokens=9)
        assert text == Text([*lm.prompt_ids("what is statquest"), *completion.ids], completion.prompt_tokens, end, True)
        short = continued(lm, "what is statquest", 1, {})
        assert short == Text(lm.prompt_ids("what is statquest"), 4, completion.ids[0], False)


def test_a_text_of_more_tokens_than_fit_is_refused_before_it_is_computed(classic, monkeypatch):
    monkeypatch.setattr("pastkey.see.text.MOST_TOKENS", 5)
    with pastkey.load(classic / "bundle", "cpu") as lm:
        monkeypatch.setattr(type(lm), "generate", None)
        with pytest.raises(InputError, match="the prompt has 4 tokens and 9 may follow; see looks inside 5 at most"):
            continued(lm, "what is statquest", 9, {})


def test_stages_are_those_of_the_sampler_and_contain_its_draw():
    logits = np.random.default_rng(0).normal(0, 3, (3, 50)).astype(np.float32)
    text = Text([4, 8, 15], 2, 16, False)
    found = list(stages(text, 0, logits, {**EXAMPLE, "repetition_penalty": 1.3}, 5))
    assert [step.names for step in found] == [["all tokens", "penalties", "temperature", "top_k", "top_p", "min_p"]] * 3
    for place, step in enumerate(found):
        assert step.kept == sorted(step.kept, reverse=True)
        assert step.kept[3] == 40
        assert step.ids.tolist() == np.argsort(-logits[place])[:5].tolist()
        sampler = Sampler(SamplingConfig.of({**EXAMPLE, "repetition_penalty": 1.3}), prompt_tokens=2)
        drawn = sampler(logits[place], text.ids[: place + 1])
        *_, (_, last) = sampler.stages(logits[place], text.ids[: place + 1])
        assert last[drawn] > -np.inf
        assert np.isclose(np.exp(last - last.max()).sum() * step.probabilities[-1].max(), 1)

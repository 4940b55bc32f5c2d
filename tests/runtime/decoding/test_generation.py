from __future__ import annotations

import dataclasses

import pytest

from pastkey.errors import InputError
from pastkey.runtime.decoding.generation import Generation
from pastkey.runtime.decoding.request import Request
from pastkey.runtime.engine.engine import Engine

PROMPT = [5, 6, 7]


@pytest.fixture
def session(bundle):
    return Engine(bundle, threads=1)


@pytest.mark.parametrize(("prompt", "expected"), [(24, 1), (23, 2), (20, 5), (1, 24)])
def test_the_last_token_may_stand_behind_the_context(session, prompt, expected):
    session.graph.manifest = dataclasses.replace(session.manifest, context_length=24)
    generation = Generation(session, Request(list(range(prompt)), max_new_tokens=100))
    assert len(list(generation)) == expected
    assert (generation.finish_reason, generation.prompt_tokens) == ("length", prompt)


def test_a_generation_that_another_took_over_says_so(session):
    first = Generation(session, Request(PROMPT, max_new_tokens=10))
    next(first)
    assert len(list(Generation(session, Request([1, 2], max_new_tokens=3)))) == 3
    with pytest.raises(InputError, match="another generation began"):
        next(first)


@pytest.mark.parametrize(
    ("prompt", "new", "word"),
    [
        ([], 5, "the prompt is empty"),
        ([37], 5, "out of range"),
        ([1] * 601, 5, "the context is 600"),
        ([1], -1, "max_new"),
    ],
)
def test_what_cannot_be_continued_is_refused_at_once(session, prompt, new, word):
    with pytest.raises(InputError, match=word):
        Generation(session, Request(prompt, max_new_tokens=new))


def test_a_prefix_in_the_engines_cache_is_reused(session, tiny):
    first = [*PROMPT, *Generation(session, Request(PROMPT, max_new_tokens=9))]
    second = Generation(session, Request([*first, 8, 9], max_new_tokens=3, reuse_prefix=True))
    assert list(second) == tiny.greedy([*first, 8, 9], 3)
    assert second.cached_tokens == len(first) - 1

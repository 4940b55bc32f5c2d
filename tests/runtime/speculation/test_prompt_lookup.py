"""Guessing what comes next from the text itself: never another text, and fewer steps where it repeats itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pastkey.errors import NumericsError
from pastkey.runtime.decoding.generation import Generation
from pastkey.runtime.decoding.request import Request
from pastkey.runtime.engine.engine import Engine
from pastkey.runtime.settings import MAX_DRAFT_TOKENS, SamplingConfig
from pastkey.runtime.speculation.prompt_lookup import PromptLookup

PROMPT = [5, 6, 7, 9, 11, 5, 6, 7]


def repeating() -> PromptLookup:
    """One whose drafts were all accepted so far."""
    prompt_lookup = PromptLookup()
    for drafted in (1, 3):
        prompt_lookup.record(drafted, drafted)
    return prompt_lookup


# --- drafts ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4], [5, 6, 7]),
        ([0, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4], [5, 6]),  # one less than agree
        ([7] * 5, [7, 7, 7]),  # beyond the end it is the draft's own token
        ([1, 2, 1, 2, 1, 2], [1, 2, 1]),
        ([1, 2, 8, 9, 1, 2, 7, 6, 1, 2], [7]),  # the latest place
        ([3, 1, 2, 8, 9, 5, 4, 1, 2, 7, 6, 3, 1, 2], [8, 9]),  # unless more agrees at another
        ([1, 2, 3, 4, 2], []),  # a single token says nothing
        ([], []),
    ],
)
def test_what_followed_the_last_time_is_drafted(ids, expected):
    assert repeating().draft(ids, 3) == expected


def test_no_more_is_drafted_than_there_is_room_for():
    ids = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    assert [repeating().draft(ids, most) for most in (-1, 0, 1, 2, 3)] == [[], [], [4], [4, 5], [4, 5]]


def test_a_growing_text_is_drafted_as_a_whole_one():
    ids = np.random.default_rng(0).integers(0, 4, 200).tolist()
    growing = repeating()
    for end in range(len(ids)):
        assert growing.draft(ids[:end], 7) == repeating().draft(ids[:end], 7), end


def test_rejections_raise_the_length_of_a_match():
    ids = [1, 2, 3, 4, 9, 1, 2, 3]
    prompt_lookup = PromptLookup()
    assert prompt_lookup.draft(ids, 1) == [4]  # three tokens agree
    prompt_lookup.record(1, 0)
    assert prompt_lookup.draft(ids, 1) == [4]
    prompt_lookup.record(1, 0)
    assert prompt_lookup.draft(ids, 1) == []
    prompt_lookup.record(1, 1)
    assert prompt_lookup.draft(ids, 1) == [4]


def test_a_long_match_is_drafted_after_any_number_of_rejections():
    ids = [*range(20), *range(10)]
    prompt_lookup = PromptLookup()
    for _ in range(100):
        prompt_lookup.record(1, 0)
    assert prompt_lookup.draft(ids[:22], 1) == []
    assert prompt_lookup.draft(ids, 1) == [10]


# --- generating ---------------------------------------------------------------------------------------------------
@pytest.fixture
def session(fused_bundle):
    return Engine(fused_bundle, threads=1)


def steps_of(session: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens of all runs from now on."""
    runs: list[int] = []
    run = session.run

    def counted(ids: Any, *arguments: Any, **named: Any) -> Any:
        runs.append(np.atleast_2d(ids).shape[1])
        return run(ids, *arguments, **named)

    monkeypatch.setattr(session, "run", counted)
    return runs


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.3, "seed": 3}, {"temperature": 0.2, "top_k": 3, "seed": 1}, {"repetition_penalty": 1.1}],
    ids=["greedy", "sampled", "top_k", "penalty"],
)
def test_the_text_is_the_same_in_fewer_steps(session, monkeypatch, settings):
    sampling = SamplingConfig(**settings)
    plain = list(Generation(session, Request(PROMPT, max_new_tokens=200, sampling=sampling, prompt_lookup=False)))
    runs = steps_of(session, monkeypatch)
    generation = Generation(session, Request(PROMPT, max_new_tokens=200, sampling=sampling))
    assert list(generation) == plain
    assert generation.new_tokens == 200
    assert max(runs[1:]) == MAX_DRAFT_TOKENS + 1
    assert len(runs) < (100 if settings.get("repetition_penalty", 1) == 1 else 200)
    assert session.length == len(PROMPT) + 199  # the last token is not fed, and no rejected token stays


def test_rejected_drafts_leave_nothing_behind(session, tiny, monkeypatch):
    monkeypatch.setattr(PromptLookup, "draft", lambda self, ids, most: [36, 35, 34][: max(0, most)])
    plain = list(Generation(session, Request(PROMPT, max_new_tokens=30, prompt_lookup=False)))
    assert not {34, 35, 36} & set(plain)
    runs = steps_of(session, monkeypatch)
    assert list(Generation(session, Request(PROMPT, max_new_tokens=30))) == plain
    assert runs[1] == 4
    assert session.length == len(PROMPT) + 29
    np.testing.assert_allclose(session.decode(plain[-1]), tiny([*PROMPT, *plain])[-1], atol=1e-4)


def test_an_end_token_in_an_accepted_draft_ends_it(session, monkeypatch):
    plain = list(Generation(session, Request(PROMPT, max_new_tokens=30, prompt_lookup=False)))
    end = next(token for i, token in enumerate(plain) if i >= 2 and token not in plain[:i])
    known = [*PROMPT, *plain]
    monkeypatch.setattr(PromptLookup, "draft", lambda self, ids, most: known[len(ids) : len(ids) + most])
    generation = Generation(session, Request(PROMPT, max_new_tokens=30, end_ids=[end]))
    assert list(generation) == plain[: plain.index(end)]
    assert generation.finish_reason == "stop"
    assert generation.new_tokens == plain.index(end)


@pytest.mark.parametrize("new", [1, 3, 30])
def test_no_more_is_tried_than_is_wanted_or_fits(fused_bundle, new):
    session = Engine(fused_bundle, threads=1)
    session.graph.manifest = session.manifest.__class__(**{**vars(session.manifest), "context_length": 24})
    prompt = [3, 4, 5] * 5
    plain = list(Generation(session, Request(prompt, max_new_tokens=new, prompt_lookup=False)))
    assert list(Generation(session, Request(prompt, max_new_tokens=new))) == plain
    assert len(plain) == min(new, 10)
    assert session.length <= 24


def test_nan_behind_a_draft_does_not_end_the_text(tiny, make_bundle):
    """The text ends before position 17, from which on there are no numbers, and a draft reaches beyond."""
    prompt, end = [3, 4, 5] * 5, 9
    broken = tiny.saying([*prompt[1:], 3, 4, end])
    broken.weights["position"][17:] = np.nan
    session = Engine(make_bundle(broken, "fused"), threads=1)
    generation = Generation(session, Request(prompt, max_new_tokens=30, end_ids=[end]))
    assert list(generation) == [3, 4]
    assert generation.finish_reason == "stop"
    assert session.length == 17
    with pytest.raises(NumericsError, match="position 17"):
        list(Generation(session, Request(prompt, max_new_tokens=30)))


def test_the_standard_graph_generates_one_by_one(standard_bundle, monkeypatch):
    """Its cache would be copied to be trimmed."""
    session = Engine(standard_bundle, threads=1)
    assert not session.graph.supports_drafts
    runs = steps_of(session, monkeypatch)
    assert len(list(Generation(session, Request(PROMPT, max_new_tokens=40)))) == 40
    assert set(runs[1:]) == {1}

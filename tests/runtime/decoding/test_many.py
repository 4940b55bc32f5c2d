"""Several prompts in one call: each as if alone, the results in order."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from pastkey.errors import InputError, OptionError
from pastkey.runtime import Completion, load

SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 1, "prompt_lookup": False}
PROMPTS = ["abc" * (number + 1) for number in range(21)]


def same(found: Completion, expected: Completion) -> bool:
    return (found.ids, found.text, found.finish_reason) == (expected.ids, expected.text, expected.finish_reason)


def test_each_is_as_if_alone_and_in_order(model):
    told: list[tuple[int, int]] = []
    found = model.generate(PROMPTS, progress=lambda done, count: told.append((done, count)), **SETTINGS)
    expected = [model.generate(prompt, **SETTINGS) for prompt in PROMPTS]
    assert len(found) == 21
    assert all(map(same, found, expected))
    assert told == [(done, 21) for done in range(1, 22)]
    with pytest.raises(RuntimeError, match="enough"):  # an error of the callback ends all
        model.generate(PROMPTS, progress=enough, **SETTINGS)
    assert model.scheduler.live == 0


def enough(done: int, count: int) -> None:
    raise RuntimeError("enough")


def test_they_share_runs(speaking_bundle):
    model = load(speaking_bundle.path, threads=1, max_batch=8)
    model.generate(PROMPTS, **SETTINGS)
    assert model.scheduler.batched > 20 * 9
    alone = load(speaking_bundle.path, threads=1, max_batch=1)
    found = alone.generate(PROMPTS, **SETTINGS)
    assert alone.scheduler.batched == 0
    assert all(map(same, found, model.generate(PROMPTS, **SETTINGS)))


@pytest.mark.parametrize("prompts", [[[1, 2], [3]], ([1, 2], (3,)), np.array([[1, 2], [3, 4]]), [np.array([1, 2])]])
def test_ids_of_any_kind(model, prompts):
    found = model.generate(prompts, **SETTINGS)
    assert [completion.ids for completion in found] == [
        model.generate([int(token) for token in prompt], **SETTINGS).ids for prompt in prompts
    ]


def test_a_stream_of_several_tells_whose_each_piece_is(model):
    streams = model.stream_many(PROMPTS[:3], **SETTINGS)
    texts = ["", "", ""]
    places = []
    for place, chunk in streams:
        texts[place] += chunk.text
        places.append(place)
    assert texts == [model.generate(prompt, **SETTINGS).text for prompt in PROMPTS[:3]]
    assert places[:6] == [0, 1, 2, 0, 1, 2]
    assert [completion and completion.text for completion in streams.completions] == texts


def test_what_is_wrong_is_told_before_anything_runs(model):
    steps = model.scheduler.steps
    for prompts, words in (
        (["abc", ""], "the prompt is empty"),
        (["abc", "a" * 700], "the context is 600"),
        ([[1], [99]], "token id 99 is out of range"),
    ):
        with pytest.raises(InputError, match=words):
            model.stream_many(prompts)
    with pytest.raises(OptionError, match=r"stream_many\(\) has no option 'temprature'"):
        model.stream_many(["abc"], temprature=1)
    assert model.scheduler.steps == steps


@pytest.mark.parametrize(("prompts", "n"), [(PROMPTS[:2], 20), (PROMPTS, None)])
def test_streams_are_opened_when_they_are_due(speaking_bundle, prompts, n):
    model, most = load(speaking_bundle.path, threads=1, max_batch=3), 0
    for _ in model.stream_many(prompts, n=n, **SETTINGS):
        activity = model.activity
        most = max(most, activity.running + activity.waiting)
    assert most == 3  # the rows of a batch


def test_continuations_of_prompts_are_in_order(model):
    told = list[tuple[int, int]]()
    streams = model.stream_many(PROMPTS[:2], n=20, **SETTINGS)
    list(streams)
    found = model.generate(PROMPTS[:2], progress=lambda *done: told.append(done), n=20, **SETTINGS)
    assert [one.ids for one in found] == [one.ids for one in streams.completions if one is not None]
    assert told == [(done, 40) for done in range(1, 41)]


@pytest.mark.parametrize("end", ["close", "cancel"])
def test_continuations_that_are_not_due_end_with_the_call(speaking_bundle, end):
    model = load(speaking_bundle.path, threads=1, max_batch=3)
    streams = model.stream_many(["abc" * 20], n=20, **SETTINGS)
    next(streams)
    getattr(streams, end)()
    assert list(streams) == []
    found = [one.finish_reason for one in streams.completions if one is not None]
    assert found == ["cancelled"] * (20 if end == "cancel" else 3)
    activity = model.activity
    assert (activity.running, activity.waiting, model.scheduler.live) == (0, 0, 0)


def test_closing_and_cancelling_keep_what_there_is(model):
    expected = [model.generate(prompt, **SETTINGS).ids for prompt in PROMPTS[:3]]
    for end in ("close", "cancel"):
        streams = model.stream_many(PROMPTS[:3], **SETTINGS)
        taken = len(list(itertools.islice(streams, 6)))
        getattr(streams, end)()
        assert list(streams) == []
        assert taken == 6
        found = [completion.ids for completion in streams.completions if completion is not None]
        assert found == [ids[:2] for ids in expected]
        assert model.scheduler.live == 0

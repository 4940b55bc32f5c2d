"""A text by only an engine, and several prompts in one call: each as in a separate call, the results in order."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from pastkey.errors import InputError, OptionError
from pastkey.runtime import Completion, load
from pastkey.runtime.decoding.generation import Generation
from pastkey.runtime.decoding.request import Request
from pastkey.runtime.sampling.random_stream import continuation_seed

from ..conftest import DRAWN, runs_of

SETTINGS: dict[str, Any] = {**DRAWN, "prompt_lookup": False}
PROMPTS = ["abc" * (number + 1) for number in range(21)]


def told(completions: list[Completion]) -> list[Any]:
    return [(found.ids, found.text, found.finish_reason) for found in completions]


def test_each_is_as_if_alone_and_in_order(model):
    progress: list[tuple[int, int]] = []
    found = model.generate(PROMPTS, lambda *done: progress.append(done), **SETTINGS)
    assert told(found) == told([model.generate(prompt, **SETTINGS) for prompt in PROMPTS])
    assert progress == [(done, 21) for done in range(1, 22)]

    def enough(done: int, count: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):  # an error of the callback ends all
        model.generate(PROMPTS, progress=enough, **SETTINGS)
    assert model.scheduler.live == 0


def test_they_share_runs_of_at_most_max_batch(speaking_bundle, monkeypatch):
    models = [load(speaking_bundle.path, threads=1, max_batch=rows) for rows in (8, 1)]
    shapes = [runs_of(model.require_open().graph, monkeypatch) for model in models]
    found = [told(model.generate(PROMPTS, **SETTINGS)) for model in models]
    assert found[0] == found[1]
    assert [max(rows for rows, _ in each) for each in shapes] == [8, 1]
    assert models[0].scheduler.batched > 20 * 9


@pytest.mark.parametrize("prompts", [[[1, 2], [3]], ([1, 2], (3,)), np.array([[1, 2], [3, 4]]), [np.array([1, 2])]])
def test_ids_of_any_kind(lm, prompts):
    alone = [lm.generate([int(token) for token in prompt], **SETTINGS) for prompt in prompts]
    assert told(lm.generate(prompts, **SETTINGS)) == told(alone)


def test_a_stream_of_several_tells_whose_each_piece_is(model):
    streams, texts, places = model.stream_many(PROMPTS[:3], **SETTINGS), ["", "", ""], []
    for place, chunk in streams:
        texts[place] += chunk.text
        places.append(place)
    assert texts == [model.generate(prompt, **SETTINGS).text for prompt in PROMPTS[:3]]
    assert places[:6] == [0, 1, 2, 0, 1, 2]
    assert [completion.text for completion in streams.completions] == texts


@pytest.mark.parametrize(
    ("prompts", "options", "error", "words"),
    [
        (["abc", ""], {}, InputError, "the prompt is empty"),
        (["abc", "a" * 700], {}, InputError, "the context is 600"),
        ([[1], [99]], {}, InputError, "token id 99 is out of range"),
        (["abc"], {"temprature": 1}, OptionError, r"stream_many\(\) has no option 'temprature'"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(lm, prompts, options, error, words):
    steps = lm.scheduler.steps
    with pytest.raises(error, match=words):
        lm.stream_many(prompts, **options)
    assert lm.scheduler.steps == steps


@pytest.mark.parametrize(("prompts", "n"), [(PROMPTS[:2], 20), (PROMPTS, None)])
def test_streams_are_opened_when_they_are_due(speaking_bundle, prompts, n):
    model, most = load(speaking_bundle.path, threads=1, max_batch=3), 0
    for _ in model.stream_many(prompts, n=n, **SETTINGS):
        most = max(most, model.activity.running + model.activity.waiting)
    assert most == 3  # the rows of a batch


def test_continuations_of_prompts_are_in_order(speaking_bundle):
    model, progress = load(speaking_bundle.path, threads=1), list[Any]()
    streams = model.stream_many(PROMPTS[:2], n=20, **SETTINGS)
    list(streams)
    found = model.generate(PROMPTS[:2], lambda *done: progress.append(done), n=20, **SETTINGS)
    assert told(found) == told([one for one in streams.completions if one is not None])
    second = [model.generate(PROMPTS[1], **{**SETTINGS, "seed": continuation_seed(1, i)}) for i in range(20)]
    assert told(found[20:]) == told(second)
    assert progress == [(done, 40) for done in range(1, 41)]


@pytest.mark.parametrize("end", ["close", "cancel"])
def test_closing_and_cancelling_keep_what_there_is(speaking_bundle, lm, end):
    model = load(speaking_bundle.path, threads=1, max_batch=3)
    streams = model.stream_many(PROMPTS[:3], **SETTINGS)
    assert len(list(itertools.islice(streams, 6))) == 6
    getattr(streams, end)()
    assert list(streams) == []
    assert [one.ids for one in streams.completions] == [lm.generate(p, **SETTINGS).ids[:2] for p in PROMPTS[:3]]
    streams = model.stream_many(["abc" * 20], n=20, **SETTINGS)  # most are not due
    next(streams)
    getattr(streams, end)()
    assert list(streams) == []
    found = [one.finish_reason for one in streams.completions if one is not None]
    assert found == ["cancelled"] * (20 if end == "cancel" else 3)
    assert (model.activity.running, model.activity.waiting, model.scheduler.live) == (0, 0, 0)


# --- by only an engine ---------------------------------------------------------------------------------------------
PROMPT = [5, 6, 7]


@pytest.mark.parametrize(("prompt", "expected"), [(24, 1), (23, 2), (20, 5), (1, 24)])
def test_the_last_token_may_stand_behind_the_context(engine, prompt, expected):
    engine.graph.manifest = dataclasses.replace(engine.manifest, context_length=24)
    generation = Generation(engine, Request(list(range(prompt)), max_new_tokens=100))
    assert len(list(generation)) == expected
    assert (generation.finish_reason, generation.prompt_tokens) == ("length", prompt)


def test_a_generation_that_another_took_over_says_so(engine):
    first = Generation(engine, Request(PROMPT, max_new_tokens=10))
    next(first)
    assert len(list(Generation(engine, Request([1, 2], max_new_tokens=3)))) == 3
    with pytest.raises(InputError, match="another generation began"):
        next(first)


def test_a_prefix_in_the_engines_cache_is_reused(engine, tiny):
    first = [*PROMPT, *Generation(engine, Request(PROMPT, max_new_tokens=9))]
    second = Generation(engine, Request([*first, 8, 9], max_new_tokens=3, reuse_prefix=True))
    assert list(second) == tiny.greedy([*first, 8, 9], 3)
    assert second.cached_tokens == len(first) - 1

"""Several continuations of one prompt: each the text of its own seed, and one prefill."""

from __future__ import annotations

import weakref
from typing import Any
from unittest.mock import ANY

import pytest

from pastkey.runtime import Engine, LanguageModel, load
from pastkey.runtime.decoding.batching.shared_prefill import SharedPrefills
from pastkey.runtime.decoding.many import continuations
from pastkey.runtime.decoding.stream import ChunkStream
from pastkey.runtime.engine.decoder_graph import DecoderGraph
from pastkey.runtime.model.opening import open_prompt
from pastkey.runtime.sampling.random_stream import continuation_seed

from ...conftest import ids_of, runs_of
from ...rotary import RotaryTiny

DRAWN: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 5}
PROMPT = "abcabcab" * 3


def alone(model: LanguageModel, number: int, prompt: str = PROMPT) -> list[int]:
    return model.generate(prompt, **{**DRAWN, "seed": continuation_seed(5, number)}).ids


@pytest.mark.parametrize("n", [1, 5, 20])
def test_each_is_the_text_of_its_seed(model, n):
    found = model.generate(PROMPT, n=n, **DRAWN)
    texts = [alone(model, number) for number in range(n)]
    assert [completion.ids for completion in found] == texts
    assert found[0].ids == model.generate(PROMPT, **DRAWN).ids
    if model.require_open().graph.copies:  # the prompt is computed once
        assert [completion.cached_tokens for completion in found] == [0] + [22] * (n - 1)
    once: Any = iter([5, 6, 7])
    twice = [completion.ids for completion in model.generate(once, n=2, max_new_tokens=3)]
    assert twice == [model.generate([5, 6, 7], max_new_tokens=3).ids] * 2
    assert n == 1 or texts[0] != texts[1]
    assert model.scheduler.live == 0


@pytest.mark.parametrize("reuse", [False, True])
def test_prompts_that_begin_alike_share_it(model, reuse):
    beginning = "abcdefgh" * 10
    prompts = [beginning + end for end in ("", "xyz", "x.y", " ")] + ["zyx" * 20, "zyx" * 21, "ab", "ab"]
    alone = [model.generate(prompt, **DRAWN).ids for prompt in prompts]
    model.scheduler.store.clear()
    shared = [[0, 78, 78, 78, 0, 58, 0, 0]]
    if reuse:  # the stored text is longer by then
        shared.append([len(prompt) - 2 for prompt in prompts[:6]])
    for cached in shared:
        found = model.generate(prompts, reuse_prefix=reuse, **DRAWN)
        assert [completion.ids for completion in found] == alone
        assert [completion.cached_tokens for completion in found][: len(cached)] == cached
    assert model.scheduler.live == 0


def test_a_window_that_has_left_the_prompt_behind(make_bundle):
    """The second continuation begins when the first has ended: at the mark behind the prompt."""
    tiny = RotaryTiny.of(16, 1000, pairs=8, inside=True, window=24)
    lm = load(tiny.written(make_bundle).path, threads=1, max_batch=1)
    prompt, options = ids_of(300), {**DRAWN, "prompt_lookup": False}
    for new in (20, 400):
        options["max_new_tokens"] = new
        found = lm.generate(prompt, n=2, **options)
        seeds = [continuation_seed(5, number) for number in range(2)]
        assert [one.ids for one in found] == [lm.generate(prompt, **{**options, "seed": s}).ids for s in seeds]
        assert found[1].cached_tokens == 298


@pytest.fixture
def engines(monkeypatch):
    """The bytes of all caches, of engines made from now on."""
    made: weakref.WeakSet[Engine] = weakref.WeakSet()
    begin = Engine._begin

    def noted(engine: Engine, graph: DecoderGraph) -> None:
        begin(engine, graph)
        made.add(engine)

    monkeypatch.setattr(Engine, "_begin", noted)
    return lambda: sum(engine.nbytes for engine in list(made))


@pytest.mark.parametrize("caches", [1, 2, 3, 6])
def test_the_copies_keep_the_memory_limit(caches, make_bundle, engines, monkeypatch):
    """A cache of 256 tokens has no row to spare. Where no copy fits, a prompt uses the cache of one before it."""
    bundle = RotaryTiny.of(16, 1000, pairs=8, inside=True).written(make_bundle)
    prompts, options = [[*ids_of(240), 1, end] for end in range(1, 6)], {**DRAWN, "max_new_tokens": 14}
    with load(bundle.path, threads=1) as free:
        alone = [free.generate(prompt, **options).ids for prompt in prompts]
        limit = caches * free.memory.estimate(256)
    lm = load(bundle.path, threads=1, max_batch=caches, max_memory=limit, prefix_bytes=0)
    sizes = list[int]()
    runs_of(lm.require_open().graph, monkeypatch, before=lambda ids: sizes.append(engines()))
    found = lm.generate(prompts, **options)
    assert [completion.ids for completion in found] == alone
    assert max(sizes) <= limit
    assert [completion.cached_tokens for completion in found][1:] == ([240] * 4 if caches in (1, 6) else ANY)


def opened(lm: LanguageModel, n: int, **options: Any) -> list[ChunkStream]:
    """The streams of `n` continuations of one prompt."""
    shared = SharedPrefills([lm.prompt_ids(PROMPT)] * n)
    return [open_prompt(lm.parts, PROMPT, one, shared) for one in continuations({**DRAWN, **options}, n)]


def test_closing_the_last_prompt_frees_the_shared_copy(lm, engines):
    first, second, third, fourth = opened(lm, 4, prompt_lookup=False)
    next(first), next(second)
    with_copy = engines()
    third.close()
    assert engines() == with_copy
    fourth.close()
    assert engines() < with_copy
    assert next(second).ids == alone(lm, 1)[1:2]


def test_continuations_prefill_when_the_first_has_ended(lm):
    first, second, third = opened(lm, 3)
    next(first)
    first.close()
    lm.generate("cccc", **DRAWN)  # the engine of the first is used again
    assert [chunk.ids[0] for chunk in second if chunk.ids] == alone(lm, 1)
    assert [chunk.ids[0] for chunk in third if chunk.ids] == alone(lm, 2)


def test_calls_without_a_seed_differ_and_greedy_continuations_are_equal(lm):
    one, other = ([c.ids for c in lm.generate(PROMPT, n=4, **{**DRAWN, "seed": None})] for _ in range(2))
    assert one != other
    assert one.count(one[0]) < 4
    greedy = [completion.ids for completion in lm.generate(PROMPT, n=3, max_new_tokens=9)]
    assert greedy.count(greedy[0]) == 3

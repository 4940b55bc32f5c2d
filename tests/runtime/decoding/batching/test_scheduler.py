"""Generations at the same time: each text is the one of the same call alone, whoever else is there."""

from __future__ import annotations

import gc
import itertools
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from pastkey.errors import NumericsError
from pastkey.runtime import LanguageModel, load
from pastkey.runtime.decoding.batching.scheduler import AHEAD, STALLED
from pastkey.runtime.settings import MAX_DRAFT_TOKENS

from ...conftest import TEMPLATE, runs_of
from ...soak import Soak
from .waiting import until

SETTINGS: dict[str, Any] = {"max_new_tokens": 25, "temperature": 1.0, "seed": 1, "prompt_lookup": False}


@pytest.fixture(scope="module", params=["fused", "standard", "static", "int8_kv"])
def any_bundle(request, tiny, letters, make_bundle):
    """With each way that a cache can be."""
    kind, fields = request.param, {}
    if kind == "static":
        fields = {"chunk": 8}
    elif kind == "int8_kv":
        kind, fields = "fused", {"int8_kv": True}
    return make_bundle(tiny, kind, tokenizer=letters, tokenizer_config={"chat_template": TEMPLATE}, **fields)


@pytest.fixture
def model(talking):
    return load(talking, threads=1)


@pytest.fixture(scope="module")
def fresh(talking):
    """Another model of the same weights, for what an answer should be."""
    return load(talking, threads=1)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as executor:
        yield executor


def test_sixteen_threads_get_the_texts_of_calls_alone(any_bundle, tmp_path):
    model, alone = load(any_bundle.path, threads=1), load(any_bundle.path, threads=1)
    soaked = Soak(model, alone, tmp_path).run(2.0, watched=False)
    assert soaked.done.total() > 20
    assert bool(model.scheduler.batched) is (any_bundle.manifest.graph == "fused")


def test_more_requests_than_a_batch_takes_get_the_texts_of_calls_alone(talking, fresh, monkeypatch):
    model, prompts = load(talking, threads=1, max_batch=3), ["a", "bcd" * 30, "efg", "ab", "cde", "ga", "fb"]
    shapes = runs_of(model.require_open().graph, monkeypatch)
    streams = [model.stream(prompt, **SETTINGS) for prompt in prompts]
    found: list[list[int]] = [[] for _ in prompts]
    while any(stream.completion is None for stream in streams):
        for ids, stream in zip(found, streams, strict=True):
            ids += [token for chunk in itertools.islice(stream, 1) for token in chunk.ids]
    assert found == [fresh.generate(prompt, **SETTINGS).ids for prompt in prompts]
    assert max(rows for rows, _ in shapes) == 3


def test_streams_that_one_thread_reads_in_turn_are_decoded_together(any_bundle, monkeypatch):
    model, alone = load(any_bundle.path, threads=1), load(any_bundle.path, threads=1)
    prompts = ["a", "bcd" * 30, "efg"]
    expected = [alone.generate(prompt, **SETTINGS) for prompt in prompts]
    shapes = runs_of(model.require_open().graph, monkeypatch)
    streams = [model.stream(prompt, **SETTINGS) for prompt in prompts]
    found: list[list[int]] = [[], [], []]
    while any(stream.completion is None for stream in streams):
        for ids, stream in zip(found, streams, strict=True):
            ids += [token for chunk in itertools.islice(stream, 1) for token in chunk.ids]
    assert found == [completion.ids for completion in expected]
    texts = [stream.completion.text for stream in streams if stream.completion is not None]
    assert texts == [completion.text for completion in expected]
    if any_bundle.manifest.graph == "fused":
        assert [rows for rows, _ in shapes].count(3) >= 20


def test_a_stream_that_nobody_reads_holds_nobody_up_and_is_not_decoded_without_bound(model, fresh, monkeypatch):
    stalled, read = model.stream("abc", **SETTINGS), model.stream("de", **SETTINGS | {"max_new_tokens": 100})
    next(stalled)
    next(read)
    shapes = runs_of(model.require_open().graph, monkeypatch)
    rest = list(read)
    assert len(rest) == 99
    assert 1 + AHEAD <= [rows for rows, _ in shapes].count(2) + 1 <= AHEAD + 2
    assert len(shapes) > STALLED + AHEAD
    assert not model.scheduler.shares_memory(stalled._generation.engine)
    ids = [token for chunk in stalled for token in chunk.ids]
    assert ids == fresh.generate("abc", **SETTINGS).ids[1:]


def test_a_stream_that_was_only_made_takes_nothing(model, monkeypatch):
    shapes = runs_of(model.require_open().graph, monkeypatch)
    made = model.stream("world", **SETTINGS)
    assert model.scheduler.live == 0
    assert shapes == []
    made.close()
    assert made.completion is not None
    assert (made.completion.ids, made.completion.finish_reason) == ([], "cancelled")


def test_a_long_prompt_does_not_hold_the_others_up(model, monkeypatch):
    stream = model.stream("abc", **SETTINGS | {"max_new_tokens": 60})
    next(stream)
    shapes = runs_of(model.require_open().graph, monkeypatch)
    late = model.stream("x" * 500)  # which lives until the end of this, however fast it is
    thread = threading.Thread(target=lambda: next(late), daemon=True)
    thread.start()
    until(lambda: model.scheduler.live == 2)
    list(stream)
    thread.join()
    chunks = [tokens for rows, tokens in shapes if tokens > MAX_DRAFT_TOKENS + 1]
    assert max(chunks) <= 64
    assert sum(chunks) == 500


def test_a_late_comer_gets_its_first_token_within_three_steps(model, monkeypatch):
    streams = [model.stream(prompt, **SETTINGS) for prompt in ("a", "bc", "def")]
    for _ in range(3):
        for stream in streams:
            next(stream)
    shapes = runs_of(model.require_open().graph, monkeypatch)
    next(model.stream("late"))
    assert len(shapes) <= 3


def test_an_error_belongs_to_its_own_generation(tiny, letters, make_bundle):
    """The model yields infinity at position 40, alone or among others; with drafts it reaches earlier ones."""
    weights = dict(tiny.weights)
    weights["position"] = weights["position"].copy()
    weights["position"][40] = np.inf
    broken = type(tiny)(tiny.layers, tiny.context_length, weights)
    model = load(make_bundle(broken, "fused", tokenizer=letters).path, threads=1)
    expected = model.generate("abc", **SETTINGS).ids
    dying, living = model.stream("a" * 30, max_new_tokens=30, prompt_lookup=False), model.stream("abc", **SETTINGS)
    found = list[int]()

    def read_both() -> None:
        for _ in dying:
            found.extend(token for chunk in itertools.islice(living, 1) for token in chunk.ids)

    with pytest.raises(NumericsError, match="position 40"):
        read_both()
    found += [token for chunk in living for token in chunk.ids]
    assert found == expected


def test_a_stream_that_is_collected_leaves(model, monkeypatch):
    circle: list[Any] = [model.stream("abc", **SETTINGS)]
    other = model.stream("de", **SETTINGS)
    next(circle[0])
    next(other)
    circle.append(circle)
    del circle
    gc.collect()
    shapes = runs_of(model.require_open().graph, monkeypatch)
    list(other)
    assert max(rows for rows, _ in shapes) == 1
    assert model.scheduler.live == 0


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signal can be sent to a thread here")
def test_an_interrupt_at_any_moment_leaves_the_others_and_the_model_as_they_were(model, fresh, pool):
    main = threading.main_thread().ident
    assert main is not None
    expected = {prompt: fresh.generate(prompt, **SETTINGS).ids for prompt in ("abc", "de", "f")}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    interrupted = 0

    def generated(prompt: str) -> list[int]:
        return model.generate(prompt, **SETTINGS).ids

    try:
        for moment in range(40):
            others = {prompt: pool.submit(generated, prompt) for prompt in ("abc", "de")}
            timer = threading.Timer(moment * 0.0003, signal.pthread_kill, (main, signal.SIGINT))
            try:
                timer.start()
                for _ in range(1000):
                    model.generate("f", **SETTINGS)
            except KeyboardInterrupt:
                interrupted += 1
            timer.join()
            for prompt, future in others.items():
                assert future.result(timeout=60) == expected[prompt]
            assert model.generate("f", **SETTINGS).ids == expected["f"]
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupted == 40


def test_eight_threads_hold_a_conversation_each(model, fresh, pool):
    barrier = threading.Barrier(8)

    def converse(lm: LanguageModel, place: int) -> list[dict[str, str]]:
        chat = lm.chat("be " + "abcdefgh"[place])
        if lm is model:
            barrier.wait()
        for text in ("hello", "and now", "bye"):
            chat.ask(text, **SETTINGS)
        return chat.messages

    futures = [pool.submit(converse, model, place) for place in range(8)]
    assert [future.result() for future in futures] == [converse(fresh, place) for place in range(8)]

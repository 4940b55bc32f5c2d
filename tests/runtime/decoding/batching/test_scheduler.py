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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pastkey.errors import NumericsError
from pastkey.runtime import load
from pastkey.runtime.decoding.batching.scheduler import AHEAD, STALLED
from pastkey.runtime.settings import MAX_DRAFT_TOKENS

from ...conftest import TEMPLATE, runs_of
from ...soak import Soak
from .waiting import until

SETTINGS: dict[str, Any] = {"max_new_tokens": 25, "temperature": 1.0, "seed": 1, "prompt_lookup": False}


@pytest.fixture(scope="module", params=["fused", "standard", "static"])
def any_bundle(request, tiny, letters, make_bundle):
    """With each way that a cache can be."""
    kind = request.param
    fields: dict[str, Any] = {"chunk": 8} if kind == "static" else {}
    return make_bundle(tiny, kind, tokenizer=letters, tokenizer_config={"chat_template": TEMPLATE}, **fields)


@pytest.fixture(scope="module")
def any_model(any_bundle):
    """A model of at most three rows, and what each call gives alone."""
    alone = load(any_bundle.path, threads=1)
    return load(any_bundle.path, threads=1, max_batch=3), [alone.generate(p, **options).ids for p, options in CALLS]


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


# What may be called: prompts short and long, which begin alike or not, drawn, with drafts, and with a stored prefix.
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("a", SETTINGS),
    ("bcd" * 30, SETTINGS | {"max_new_tokens": 9}),
    ("bcd" * 30 + "x", SETTINGS | {"reuse_prefix": True}),
    ("abababab", SETTINGS | {"prompt_lookup": True, "temperature": 0.2}),
    ("efg", SETTINGS | {"max_new_tokens": 1}),
]


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["begin", "begin", "read", "read", "close", "cancel", "generate"]), st.integers(0, 30)
        ),
        min_size=5,
        max_size=30,
    )
)
def test_any_order_of_calls_gives_the_texts_of_calls_alone(any_model, steps):
    """More streams than the three rows of a batch, begun, read, left and cancelled in any order by one thread."""
    model, expected = any_model
    streams: list[tuple[int, Any, list[int]]] = []  # the call, its stream, and what was read of it

    def read(stream: Any, ids: list[int], most: int | None) -> None:
        ids += [token for chunk in itertools.islice(stream, most) for token in chunk.ids]

    for step, number in steps:
        call = number % len(CALLS)
        if step == "generate":
            assert model.generate(CALLS[call][0], **CALLS[call][1]).ids == expected[call]
        elif step == "begin" or not streams:
            streams.append((call, model.stream(CALLS[call][0], **CALLS[call][1]), []))
        else:
            _, stream, ids = streams[number % len(streams)]
            if step == "read":
                read(stream, ids, 1 + number % 7)
            else:
                getattr(stream, step)()
    for call, stream, ids in streams:
        read(stream, ids, None)
        assert stream.completion.ids == ids == expected[call][: len(ids)]
        assert (stream.completion.finish_reason == "cancelled") or len(ids) == len(expected[call])
    assert (model.scheduler.live, model.activity.cache_bytes) == (0, 0)


def test_sixteen_threads_get_the_texts_of_calls_alone(model, fresh, tmp_path):
    Soak(model, fresh, tmp_path).run(60, most=64, watched=False)
    assert model.scheduler.batched


def test_streams_read_in_turn_are_batched_up_to_max_batch(talking, fresh, monkeypatch):
    model, prompts = load(talking, threads=1, max_batch=3), ["a", "bcd" * 30, "efg", "ab"]
    shapes = runs_of(model.require_open().graph, monkeypatch)
    found: list[list[int]] = [[] for _ in prompts]
    for place, chunk in model.stream_many(prompts, **SETTINGS):
        found[place] += chunk.ids
    assert found == [fresh.generate(prompt, **SETTINGS).ids for prompt in prompts]
    rows = [rows for rows, _ in shapes]
    assert max(rows) == 3
    assert rows.count(3) >= 20


def test_an_unread_stream_is_decoded_a_few_tokens_ahead_and_leaves_the_batch(model, fresh, monkeypatch):
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


def test_a_late_prompt_waits_three_steps_and_delays_no_others(model, monkeypatch):
    stream = model.stream("abc", **SETTINGS | {"max_new_tokens": 60})
    next(stream)
    shapes = runs_of(model.require_open().graph, monkeypatch)
    next(model.stream("late"))  # closed again at once
    assert len(shapes) <= 3
    late = model.stream("x" * 500)  # which lives until the end of this, however fast it is
    assert model.scheduler.live == 1  # a stream that was only made takes nothing
    thread = threading.Thread(target=lambda: next(late), daemon=True)
    thread.start()
    until(lambda: model.scheduler.live == 2)
    list(stream)
    thread.join()
    chunks = [tokens for rows, tokens in shapes if tokens > MAX_DRAFT_TOKENS + 1]
    assert max(chunks) <= 64
    assert sum(chunks) == 500


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
def test_sigint_at_any_moment_changes_no_other_text(model, fresh, pool):
    main = threading.main_thread().ident
    assert main is not None
    expected = {prompt: fresh.generate(prompt, **SETTINGS).ids for prompt in ("abc", "de", "f")}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    interrupted = 0

    def generated(prompt: str) -> list[int]:
        return model.generate(prompt, **SETTINGS).ids

    try:
        for moment in range(15):
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
    assert interrupted == 15

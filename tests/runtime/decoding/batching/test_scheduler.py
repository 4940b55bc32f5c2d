"""Generations at the same time: each text is that of the same call without the others."""

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

from pastkey.errors import NumericsError, QueueFullError
from pastkey.runtime import load
from pastkey.runtime.decoding.batching.scheduler import AHEAD, STALLED
from pastkey.runtime.settings import MAX_DRAFT_TOKENS

from ...conftest import ids_in, runs_of
from ...test_soak import Soak
from .waiting import until

SETTINGS: dict[str, Any] = {"max_new_tokens": 25, "temperature": 1.0, "seed": 1, "prompt_lookup": False}


@pytest.fixture(scope="module")
def any_model(any_bundle):
    """A model of at most three rows, and the text of each separate call."""
    alone = load(any_bundle.path, threads=1)
    return load(any_bundle.path, threads=1, max_batch=3), [alone.generate(p, **options).ids for p, options in CALLS]


@pytest.fixture
def model(talking):
    return load(talking, threads=1)


@pytest.fixture(scope="module")
def fresh(talking):
    """Another model of the same weights, for the expected answers."""
    return load(talking, threads=1)


@pytest.fixture
def shapes(model, monkeypatch):
    """Of the runs of the model."""
    return runs_of(model.require_open().graph, monkeypatch)


# The calls: prompts short and long, which begin alike or not, drawn, with drafts, and with a stored prefix.
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("a", SETTINGS),
    ("bcd" * 30, SETTINGS | {"max_new_tokens": 9}),
    ("bcd" * 30 + "x", SETTINGS | {"reuse_prefix": True}),
    ("abababab", SETTINGS | {"prompt_lookup": True, "temperature": 0.2}),
    ("efg", SETTINGS | {"max_new_tokens": 1}),
]


STEPS = st.sampled_from(["begin", "begin", "read", "read", "close", "cancel", "generate"])


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(STEPS, st.integers(0, 30)), min_size=5, max_size=30))
def test_any_order_of_calls_gives_the_texts_of_calls_alone(any_model, steps):
    """More streams than the three rows of a batch, begun, read, left and cancelled in any order by one thread."""
    model, expected = any_model
    streams: list[tuple[int, Any, list[int]]] = []  # the call, its stream, and the part that was read
    for step, number in steps:
        call = number % len(CALLS)
        if step == "generate":
            assert model.generate(CALLS[call][0], **CALLS[call][1]).ids == expected[call]
        elif step == "begin" or not streams:
            streams.append((call, model.stream(CALLS[call][0], **CALLS[call][1]), []))
        else:
            _, stream, ids = streams[number % len(streams)]
            if step == "read":
                ids += ids_in(itertools.islice(stream, 1 + number % 7))
            else:
                getattr(stream, step)()
    for call, stream, ids in streams:
        ids += ids_in(stream)
        assert stream.completion.ids == ids == expected[call][: len(ids)]
        assert (stream.completion.finish_reason == "cancelled") or len(ids) == len(expected[call])
    assert (model.scheduler.live, model.activity.cache_bytes) == (0, 0)


def test_sixteen_threads_get_the_texts_of_calls_alone(model, fresh, tmp_path):
    Soak(model, fresh, tmp_path).run(60, most=64, watched=False)
    assert model.scheduler.batched


def test_two_rows_that_repeat_themselves_take_turns_with_drafts(model, fresh):
    settings = {"max_new_tokens": 90, "prompt_lookup": True}
    for prompts, batched in ((["abab", "cdcd"], False), (["abab", "cdcd", "efef"], True)):
        before = model.scheduler.batched
        found = model.generate(prompts, **settings)
        assert [one.ids for one in found] == [fresh.generate(prompt, **settings).ids for prompt in prompts]
        assert (model.scheduler.batched - before > 150) == batched


def test_an_unread_stream_is_decoded_a_few_tokens_ahead_and_leaves_the_batch(model, fresh, shapes):
    stalled, read = model.stream("abc", **SETTINGS), model.stream("de", **SETTINGS | {"max_new_tokens": 100})
    next(stalled)
    next(read)
    shapes.clear()
    assert len(list(read)) == 99
    assert 1 + AHEAD <= [rows for rows, _ in shapes].count(2) + 1 <= AHEAD + 2
    assert len(shapes) > STALLED + AHEAD
    assert not model.scheduler.shares_memory(stalled._generation.engine)
    assert ids_in(stalled) == fresh.generate("abc", **SETTINGS).ids[1:]


def test_a_late_prompt_waits_three_steps_and_delays_no_others(model, shapes):
    stream = model.stream("abc", **SETTINGS | {"max_new_tokens": 60})
    next(stream)
    shapes.clear()
    next(model.stream("late"))  # closed again at once
    assert len(shapes) <= 3
    late = model.stream("x" * 500)  # which lives until the end of this, however fast it is
    assert model.scheduler.live == 1  # a stream that was only made uses nothing
    thread = threading.Thread(target=lambda: next(late), daemon=True)
    thread.start()
    until(lambda: model.scheduler.live == 2)
    list(stream)
    thread.join()
    chunks = [tokens for rows, tokens in shapes if tokens > MAX_DRAFT_TOKENS + 1]
    assert max(chunks) <= 64
    assert sum(chunks) == 500


def test_an_error_belongs_to_its_own_generation(tiny, letters, make_bundle):
    """A row with infinity, here at position 40, fails without the others of its batch."""
    model = load(make_bundle(tiny.spoilt(slice(40, 41), np.inf), tokenizer=letters).path, threads=1)
    expected, found = model.generate("abc", **SETTINGS).ids, list[int]()
    dying, living = model.stream("a" * 30, max_new_tokens=30, prompt_lookup=False), model.stream("abc", **SETTINGS)

    def read_both() -> None:
        for _ in dying:
            found.extend(ids_in(itertools.islice(living, 1)))

    with pytest.raises(NumericsError, match="position 40"):
        read_both()
    assert found + ids_in(living) == expected


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signal can be sent to a thread here")
def test_sigint_at_any_moment_changes_no_other_text(model, fresh):
    main = threading.main_thread().ident
    expected = {prompt: fresh.generate(prompt, **SETTINGS).ids for prompt in ("abc", "de", "f")}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    interrupted = 0
    try:
        with ThreadPoolExecutor(2) as pool:
            for moment in range(15):
                others = {prompt: pool.submit(model.generate, prompt, **SETTINGS) for prompt in ("abc", "de")}
                timer = threading.Timer(moment * 0.0003, signal.pthread_kill, (main, signal.SIGINT))
                try:
                    timer.start()
                    for _ in range(1000):
                        model.generate("f", **SETTINGS)
                except KeyboardInterrupt:
                    interrupted += 1
                timer.join()
                found = {prompt: future.result(timeout=60).ids for prompt, future in others.items()}
                assert found | {"f": model.generate("f", **SETTINGS).ids} == expected
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupted == 15


# --- how busy a model is, and the limit of its queue ----------------------------------------------------------------
@pytest.fixture
def narrow(fused_bundle):
    return load(fused_bundle.path, threads=1, max_batch=2, max_queue=1)


def test_a_request_beyond_the_queue_is_refused(narrow):
    streams = [narrow.stream([1, 2, number], max_new_tokens=4) for number in range(3)]
    with pytest.raises(QueueFullError, match="3 requests are open"):
        narrow.stream([1])
    with pytest.raises(QueueFullError):
        narrow.generate([[1], [2]])
    assert [len(list(stream)) for stream in streams] == [4, 4, 4]
    assert len(narrow.generate([[1, 2]] * 9, max_new_tokens=2)) == 9  # a call that has begun is not cut


@pytest.mark.parametrize("end", ["close", "drop", "cancel"])
def test_a_stream_that_ends_gives_its_place_back(narrow, end):
    streams = [narrow.stream([1, 2, number], max_new_tokens=4) for number in range(3)]
    next(streams[0])
    if end != "drop":
        getattr(streams[0], end)()
    if end == "cancel":
        list(streams[0])
    del streams[0]
    gc.collect()
    assert len(list(narrow.stream([1], max_new_tokens=2))) == 2


def test_the_activity_counts_what_runs_waits_and_was_done(narrow):
    first, second = (narrow.stream([1, 2, 3], max_new_tokens=5, reuse_prefix=True) for _ in range(2))
    before = narrow.activity
    next(first)
    now = narrow.activity
    list(first)
    list(second)
    after = narrow.activity
    assert [(one.running, one.waiting, one.cache_bytes > 0, one.requests) for one in (before, now, after)] == [
        (0, 2, False, 0), (1, 1, True, 0), (0, 0, False, 2),
    ]  # fmt: skip
    assert (after.prompt_tokens, after.new_tokens, after.cached_prefixes) == (6, 10, 1)
    assert after.cached_tokens == second.completion.cached_tokens > 0
    assert after.prefix_bytes > 0

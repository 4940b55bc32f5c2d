"""A stream ends in many ways: each within one step, with the text so far, and with a model that continues."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pastkey.errors import InputError, NumericsError, OptionError
from pastkey.runtime import LanguageModel, load
from pastkey.runtime.model.unpack import TemporaryFolder

from ..conftest import ids_in, runs_of
from .batching.waiting import until

SETTINGS: dict[str, Any] = {"max_new_tokens": 100, "temperature": 1.0, "seed": 1}
SHORT: dict[str, Any] = {**SETTINGS, "max_new_tokens": 25, "prompt_lookup": False}


def elsewhere(call: Callable[[], object]) -> None:
    """Calls it in another thread, and waits for its end."""
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


class Gate:
    """Waits, as a processor of logits or in a run, until it is let through."""

    def __init__(self) -> None:
        self.inside, self.open = threading.Event(), threading.Event()

    def __call__(self, ids: object, logits: Any = None) -> Any:
        self.inside.set()
        assert self.open.wait(60)
        return logits


@pytest.fixture
def graph(lm):
    return lm.require_open().graph


@pytest.mark.parametrize("end", ["close", "leave", "throw"])
def test_an_ended_stream_runs_no_further_step(lm, graph, monkeypatch, end):
    expected = lm.generate("abc", **SETTINGS)
    stream = lm.stream("abc", **SETTINGS, prompt_lookup=False)
    text = "".join(chunk.text for chunk in itertools.islice(stream, 5))
    runs = runs_of(graph, monkeypatch)
    if end == "close":
        stream.close()
    elif end == "leave":
        with stream:
            pass
    else:
        with pytest.raises(KeyError):
            stream.throw(KeyError("x"))
    assert runs == []
    done = stream.completion
    assert (done.ids, done.text, done.finish_reason) == (expected.ids[:5], text, "cancelled")
    assert text == expected.text[:5]
    assert list(stream) == []
    following = lm.generate([*lm.prompt_ids("abc"), *expected.ids[:5], 1], reuse_prefix=True, max_new_tokens=1)
    assert following.cached_tokens == 3 + 4


@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize("end", ["cancel", "close"])
def test_a_stream_ended_by_another_thread_ends_within_one_step(lm, end, others):
    beside = [lm.stream(prompt, **SETTINGS) for prompt in ("de", "f")[:others]]
    for other in beside:
        next(other)
    expected, places = lm.generate("abc", **SETTINGS), list[int]()

    def ending(ids: Any, logits: Any) -> Any:
        places.append(len(ids))
        if len(places) == 5:
            elsewhere(getattr(stream, end))
        return logits

    stream = lm.stream("abc", **SETTINGS, logits_processor=ending)
    found = ids_in(stream)
    assert found == expected.ids[: len(found)]
    assert 4 <= len(found) <= 5
    assert len(places) <= 6
    assert (stream.completion.finish_reason, stream.completion.ids) == ("cancelled", found)
    assert lm.generate("abc", **SETTINGS).ids == expected.ids


def test_a_long_prefill_is_cancelled_within_a_chunk(lm, graph, monkeypatch):
    runs = runs_of(graph, monkeypatch, before=lambda ids: elsewhere(stream.cancel))
    stream = lm.stream("a" * 600, max_new_tokens=1)
    assert list(stream) == []
    assert runs == [(1, 200)]
    assert stream.completion.new_tokens == 0


class Clock:
    """Instead of `time`: a second passes in each step."""

    def __init__(self) -> None:
        self.now = 0.0
        self.perf_counter = self.monotonic

    def monotonic(self) -> float:
        return self.now

    def __call__(self, ids: Any, logits: Any) -> Any:
        self.now += 1
        return logits


def test_a_deadline_ends_a_text_with_what_there_is(lm, monkeypatch):
    expected, clock = lm.generate("abc", **SETTINGS), Clock()
    monkeypatch.setattr("pastkey.runtime.decoding.generation.time", clock)
    completion = lm.generate("abc", **SETTINGS, timeout=9.5, logits_processor=clock)
    assert (completion.finish_reason, completion.text) == ("deadline", expected.text[:9])
    assert (clock.now, completion.new_tokens, completion.decode_seconds) == (10, 9, 9)
    assert lm.generate("abc", max_new_tokens=2, timeout=60).finish_reason == "length"


def test_each_next_may_come_from_another_thread(lm):
    stream, found = lm.stream("abc", **SETTINGS), list[int]()
    while stream.completion is None:
        elsewhere(lambda: found.extend(ids_in(itertools.islice(stream, 1))))
    assert found == lm.generate("abc", **SETTINGS).ids


# --- readers at the same time ---------------------------------------------------------------------------------------
READ_TWICE = "is being read by another thread or task"


@pytest.mark.parametrize("several", [False, True])
def test_a_second_thread_that_reads_a_stream_is_refused(lm, several):
    expected, gate = lm.generate("abc", **SHORT).ids, Gate()
    options: Any = {**SHORT, "logits_processor": gate}
    stream: Any = lm.stream_many(["abc"], **options) if several else lm.stream("abc", **options)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, stream)
        assert gate.inside.wait(60)
        with pytest.raises(InputError, match=READ_TWICE):
            next(stream)
        gate.open.set()
        chunks = [first.result(60), *stream]
    assert ids_in(chunk[1] if several else chunk for chunk in chunks) == expected


def test_a_second_task_that_reads_a_stream_is_refused(lm):
    gate = Gate()

    async def read() -> list[int]:
        stream = lm.astream("abc", **SHORT, logits_processor=gate)
        first = asyncio.create_task(anext(stream))
        await asyncio.to_thread(gate.inside.wait, 60)
        with pytest.raises(InputError, match=READ_TWICE):
            await anext(stream)
        gate.open.set()
        return ids_in([await first, *[chunk async for chunk in stream]])

    assert asyncio.run(read()) == lm.generate("abc", **SHORT).ids


def test_a_stream_is_not_read_from_within(lm):
    def within(ids: object, logits: Any) -> Any:
        with pytest.raises(InputError, match="by its own callback"):
            next(stream)
        return logits

    stream = lm.stream("abc", logits_processor=within, max_new_tokens=2)
    assert len(list(stream)) == 2


# --- in an event loop -----------------------------------------------------------------------------------------------
def test_many_tasks_get_the_texts_of_calls_alone(lm):
    prompts = ["a", "bc", "def", "ghij"] * 5
    expected = [lm.generate(prompt, **SHORT).text for prompt in prompts]

    async def streamed(prompt: str) -> str:
        return "".join([chunk.text async for chunk in lm.astream(prompt, **SHORT)])

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*map(streamed, prompts))

    assert asyncio.run(all_of_them()) == expected
    assert lm.scheduler.batched > 50
    assert lm.scheduler.live == 0


@pytest.mark.parametrize("call", ["astream", "agenerate"])
def test_a_cancelled_task_stops_within_one_run(lm, graph, monkeypatch, call):
    """It does not wait for the run, which is the first of three of a prefill, and the loop continues meanwhile."""
    gate = Gate()

    async def read() -> None:
        if call == "astream":
            await anext(lm.astream("a" * 590))
        else:
            await lm.agenerate("a" * 590)

    async def cancel() -> None:
        task = asyncio.create_task(read())
        await asyncio.to_thread(gate.inside.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not gate.open.is_set()
        gate.open.set()
        await asyncio.to_thread(until, lambda: lm.scheduler.live == 0)

    with monkeypatch.context() as patch:
        runs = runs_of(graph, patch, before=gate)
        asyncio.run(cancel())
    assert len(runs) == 1
    assert runs[0][1] < 590
    assert lm.generate("abc", **SHORT).new_tokens == 25


def test_an_error_of_a_run_comes_to_its_task(lm, graph, monkeypatch):
    def broken(*_: Any) -> None:
        raise NumericsError("not finite")

    monkeypatch.setattr(graph, "run", broken)
    with pytest.raises(NumericsError, match="not finite"):
        asyncio.run(asyncio.wait_for(lm.agenerate("abc"), 60))
    with pytest.raises(OptionError, match=r"astream\(\) has no option"):
        lm.astream("abc", temprature=1)
    assert lm.scheduler.live == 0


# --- the model's own end ------------------------------------------------------------------------------------------
def test_a_model_that_is_closed_ends_its_asynchronous_calls(speaking_bundle):
    model = load(speaking_bundle.path, threads=1)

    async def close_early() -> list[Any]:
        calls = [asyncio.create_task(model.agenerate("abc", max_new_tokens=100)) for _ in range(6)]
        async for _ in model.astream("abc"):
            model.close()
        return await asyncio.gather(*calls, return_exceptions=True)

    # One that had not begun finds the model closed.
    ends = [InputError if isinstance(end, InputError) else end.finish_reason for end in asyncio.run(close_early())]
    assert {*ends} <= {"cancelled", "length", InputError}


def test_closing_a_model_ends_its_streams(speaking_bundle):
    model = load(speaking_bundle.path, threads=1)
    stream, other, session = model.stream("abc", **SETTINGS), model.stream("de"), model.session()
    session.append("abc")
    next(stream)
    with model:
        pass
    assert list(stream) == []
    assert stream.completion.finish_reason == "cancelled"
    assert repr(model).endswith("(fp32, closed)>")
    calls: list[tuple[Any, Any]] = [
        (model.generate, "abc"), (model.generate, ["abc"]), (model.stream, "abc"), (model.astream, "abc"),
        (model.logits, [1]), (model.session, None), (session.append, "d"), (session.generate, None), (next, other),
    ]  # fmt: skip
    for call, given in calls:
        with pytest.raises(InputError, match="this model is closed: load it again"):
            call(given)
    model.close()


@pytest.mark.parametrize("others", [0, 2])
def test_a_step_s_own_callback_may_close_the_model(speaking_bundle, others):
    temporary = TemporaryFolder()
    model = LanguageModel(speaking_bundle, threads=1, temporary=temporary)
    model.generate("stored", max_new_tokens=2, reuse_prefix=True)
    beside = [model.stream(prompt, **SETTINGS) for prompt in ("de", "f")[:others]]
    for stream in beside:
        next(stream)
    calls: list[int] = []

    def closing(ids: Any, logits: Any) -> Any:
        calls.append(len(ids))
        if len(calls) == 3:
            model.close()
        return logits

    completion = model.generate("abc", **SETTINGS, prompt_lookup=False, logits_processor=closing)
    assert completion.finish_reason == "cancelled"
    assert len(calls) <= 3 + 1  # within one step
    assert not temporary.path.exists()
    assert (model.closed, len(model.scheduler.store)) == (True, 0)
    for stream in beside:
        assert len(list(stream)) <= 5  # decoded ahead, or none
        assert stream.completion.finish_reason == "cancelled"
    assert model.scheduler.live == 0

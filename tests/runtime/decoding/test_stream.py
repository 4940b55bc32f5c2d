"""A stream ends in many ways: each within one step, with what was generated, and with a model that goes on."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pastkey.errors import InputError
from pastkey.runtime import LanguageModel, load
from pastkey.runtime.model.unpack import TemporaryFolder

from ..conftest import runs_of

SETTINGS: dict[str, Any] = {"max_new_tokens": 100, "temperature": 1.0, "seed": 1}


def elsewhere(call: Callable[[], object]) -> None:
    """Calls it in another thread, and waits for its end."""
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


@pytest.mark.parametrize("end", ["close", "leave", "throw"])
def test_an_ended_stream_runs_no_further_step(lm, monkeypatch, end):
    expected = lm.generate("abc", **SETTINGS)
    stream = lm.stream("abc", **SETTINGS, prompt_lookup=False)
    chunks = list(itertools.islice(stream, 5))
    runs = runs_of(lm.require_open().graph, monkeypatch)
    if end == "close":
        stream.close()
    elif end == "leave":
        with stream:
            pass
    else:
        with pytest.raises(KeyError):
            stream.throw(KeyError("x"))
    assert runs == []
    assert stream.completion.ids == expected.ids[:5]
    assert stream.completion.text == "".join(chunk.text for chunk in chunks) == expected.text[:5]
    assert stream.completion.finish_reason == "cancelled"
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
    found = [token for chunk in stream for token in chunk.ids]
    assert found == expected.ids[: len(found)]
    assert 4 <= len(found) <= 5
    assert len(places) <= 6
    assert (stream.completion.finish_reason, stream.completion.ids) == ("cancelled", found)
    assert lm.generate("abc", **SETTINGS).ids == expected.ids


def test_a_long_prefill_is_cancelled_within_a_chunk(lm, monkeypatch):
    graph, run, tokens = lm.require_open().graph, lm.require_open().graph.run, list[int]()

    def cancelled(cache: Any, ids: Any, *arguments: Any) -> Any:
        tokens.append(ids.size)
        elsewhere(stream.cancel)
        return run(cache, ids, *arguments)

    monkeypatch.setattr(graph, "run", cancelled)
    stream = lm.stream("a" * 600, max_new_tokens=1)
    assert list(stream) == []
    assert tokens == [200]
    assert stream.completion.new_tokens == 0


class Clock:
    """In place of `time`: a second passes in each step."""

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
    assert completion.finish_reason == "deadline"
    assert (clock.now, completion.new_tokens, completion.decode_seconds) == (10, 9, 9)
    assert completion.text == expected.text[:9]
    assert lm.generate("abc", max_new_tokens=2, timeout=60).finish_reason == "length"
    for timeout in (0, -1, float("nan")):
        with pytest.raises(InputError, match=r"timeout is .* seconds above 0"):
            lm.stream("abc", timeout=timeout)


def test_each_next_may_come_from_another_thread(lm):
    stream, found = lm.stream("abc", **SETTINGS), list[int]()
    while stream.completion is None:
        elsewhere(lambda: found.extend(t for c in itertools.islice(stream, 1) for t in c.ids))
    assert found == lm.generate("abc", **SETTINGS).ids


# --- readers at the same time ---------------------------------------------------------------------------------------
class Gate:
    """A processor of logits that stands still in its first step until it is let through."""

    def __init__(self) -> None:
        self.inside, self.open = threading.Event(), threading.Event()

    def __call__(self, ids: object, logits: Any) -> Any:
        self.inside.set()
        assert self.open.wait(60)
        return logits


@pytest.mark.parametrize("several", [False, True])
def test_a_second_thread_that_reads_a_stream_is_refused(lm, several):
    expected = lm.generate("abc", max_new_tokens=4).ids
    gate = Gate()
    options: Any = {"max_new_tokens": 4, "logits_processor": gate}
    stream: Any = lm.stream_many(["abc"], **options) if several else lm.stream("abc", **options)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, stream)
        assert gate.inside.wait(60)
        try:
            with pytest.raises(InputError, match="is being read by another thread or task"):
                next(stream)
        finally:
            gate.open.set()
        chunks = [first.result(60), *stream]
    assert [token for chunk in chunks for token in (chunk[1] if several else chunk).ids] == expected


def test_a_second_task_that_reads_a_stream_is_refused(lm):
    expected = lm.generate("abc", max_new_tokens=4).ids

    async def run() -> list[int]:
        gate = Gate()
        stream = lm.astream("abc", max_new_tokens=4, logits_processor=gate)
        first = asyncio.create_task(anext(stream))
        await asyncio.to_thread(gate.inside.wait, 60)
        try:
            with pytest.raises(InputError, match="is being read by another thread or task"):
                await anext(stream)
        finally:
            gate.open.set()
        chunks = [await first, *[chunk async for chunk in stream]]
        return [token for chunk in chunks for token in chunk.ids]

    assert asyncio.run(run()) == expected


def test_a_stream_is_not_read_from_within(lm):
    found: list[str] = []

    def within(ids: object, logits: Any) -> Any:
        try:
            next(stream)
        except InputError as error:
            found.append(str(error))
        return logits

    stream = lm.stream("abc", logits_processor=within, max_new_tokens=2)
    list(stream)
    assert len(found) == 2
    assert "by a callback of its own" in found[0]


# --- the model's own end ------------------------------------------------------------------------------------------
def test_closing_a_model_ends_its_streams(speaking_bundle):
    model = load(speaking_bundle.path, threads=1)
    stream, session = model.stream("abc", **SETTINGS), model.session()
    session.append("abc")
    next(stream)
    chat_like = model.stream("de")
    with model:
        pass
    assert list(stream) == []
    assert stream.completion.finish_reason == "cancelled"
    assert repr(model).endswith("(fp32, closed)>")
    for call in (
        lambda: model.generate("abc"),
        lambda: model.generate(["abc"]),
        lambda: model.stream("abc"),
        lambda: model.session(),
        lambda: model.logits([1]),
        lambda: model.astream("abc"),
        lambda: session.append("d"),
        lambda: session.generate(),
        lambda: next(chat_like),
    ):
        with pytest.raises(InputError, match="this model is closed: load it again"):
            call()
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
    model.close()


def test_a_stream_that_is_alone_is_ten_frames_from_onnxruntime(lm, monkeypatch):
    onnx, depths = lm.require_open().graph.onnx, list[int]()
    run = onnx.run_with_iobinding

    def counted(*arguments: Any) -> None:
        depths.append(len(inspect.stack(0)) - here - 1)  # without this one; onnxruntime's own is the next
        run(*arguments)

    monkeypatch.setattr(onnx, "run_with_iobinding", counted)
    stream, here = lm.stream("abc", **SETTINGS, prompt_lookup=False), len(inspect.stack(0))
    next(stream)
    next(stream)
    assert max(depths) <= 8  # and then Session's, and onnxruntime's

"""A stream ends in many ways: each within one step, with what was generated, and with a model that goes on."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pastkey.errors import InputError
from pastkey.runtime import LanguageModel, load
from pastkey.runtime.model.unpack import TemporaryFolder

from ..conftest import runs_of

SETTINGS: dict[str, Any] = {"max_new_tokens": 100, "temperature": 1.0, "seed": 1}


def test_one_that_is_closed_runs_no_step_more_and_tells_what_there_was(lm, monkeypatch):
    expected = lm.generate("abc", **SETTINGS)
    stream = lm.stream("abc", **SETTINGS, prompt_lookup=False)
    chunks = list(itertools.islice(stream, 5))
    runs = runs_of(lm.require_open().graph, monkeypatch)
    stream.close()
    assert runs == []
    assert stream.completion is not None
    assert stream.completion.ids == expected.ids[:5]
    assert stream.completion.text == "".join(chunk.text for chunk in chunks) == expected.text[:5]
    assert stream.completion.finish_reason == "cancelled"
    assert list(stream) == []
    following = lm.generate([*lm.prompt_ids("abc"), *expected.ids[:5], 1], reuse_prefix=True, max_new_tokens=1)
    assert following.cached_tokens == 3 + 4


@pytest.mark.parametrize("others", [0, 2])
def test_one_that_another_thread_cancels_ends_within_one_step(lm, monkeypatch, others):
    beside = [lm.stream(prompt, **SETTINGS) for prompt in ("de", "f")[:others]]
    for other in beside:
        next(other)
    expected = lm.generate("abc", **SETTINGS)
    stream = lm.stream("abc", **SETTINGS, prompt_lookup=False)
    next(stream)
    runs = runs_of(lm.require_open().graph, monkeypatch, 0.02)
    moment = list[int]()

    def cancel() -> None:
        time.sleep(0.1)
        moment.append(len(runs))
        stream.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    list(stream)
    thread.join()
    assert len(runs) - moment[0] <= 1
    assert 3 <= len(runs) < 20
    assert stream.completion is not None
    assert stream.completion.finish_reason == "cancelled"
    assert stream.completion.ids == expected.ids[: stream.completion.new_tokens]
    assert lm.generate("abc", **SETTINGS).ids == expected.ids


def test_a_long_prefill_is_cancelled_within_a_chunk(lm, monkeypatch):
    runs = runs_of(lm.require_open().graph, monkeypatch, 0.05)
    stream = lm.stream("a" * 600, max_new_tokens=1)
    threading.Timer(0.01, stream.cancel).start()
    assert list(stream) == []
    assert runs == [(1, 200)]
    assert stream.completion is not None
    assert stream.completion.new_tokens == 0


def test_a_deadline_ends_it_with_what_there_is(lm, monkeypatch):
    expected = lm.generate("abc", **SETTINGS)
    runs = runs_of(lm.require_open().graph, monkeypatch, 0.02)
    completion = lm.generate("abc", **SETTINGS, timeout=0.2, prompt_lookup=False)
    assert completion.finish_reason == "deadline"
    assert 3 <= len(runs) <= 11
    assert completion.ids == expected.ids[: completion.new_tokens]
    assert completion.text == expected.text[: completion.new_tokens]
    # One that waits for another's long step ends in time, too.
    assert lm.generate("abc", max_new_tokens=2, timeout=60).finish_reason == "length"


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_an_impossible_deadline_is_refused(lm, timeout):
    with pytest.raises(InputError, match=r"timeout is .* seconds above 0"):
        lm.stream("abc", timeout=timeout)


def test_one_may_come_from_another_thread_each_time(lm):
    expected = lm.generate("abc", **SETTINGS).ids
    stream, found = lm.stream("abc", **SETTINGS), list[int]()
    while stream.completion is None:
        thread = threading.Thread(target=lambda: found.extend(t for c in itertools.islice(stream, 1) for t in c.ids))
        thread.start()
        thread.join()
    assert found == expected


def test_one_that_another_thread_closes_while_it_is_read_comes_to_its_end(lm, monkeypatch):
    stream = lm.stream("abc", **SETTINGS)
    next(stream)
    runs_of(lm.require_open().graph, monkeypatch, 0.02)
    threading.Timer(0.05, stream.close).start()
    assert len(list(stream)) < 30
    assert stream.completion is not None
    assert stream.completion.finish_reason == "cancelled"


def test_an_error_that_is_thrown_into_it_ends_it(lm):
    stream = lm.stream("abc", **SETTINGS)
    next(stream)
    with pytest.raises(KeyError):
        stream.throw(KeyError("x"))
    with lm.stream("abc", **SETTINGS) as other:
        next(other)
    for ended in (stream, other):
        assert ended.completion is not None
        assert ended.completion.new_tokens == 1


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
def test_a_second_reader_of_a_stream_is_told_and_the_first_goes_on(lm, several):
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


def test_a_second_task_that_reads_a_stream_is_told_and_the_first_goes_on(lm):
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
def test_a_model_that_is_closed_ends_what_runs_and_refuses_the_rest(speaking_bundle):
    model = load(speaking_bundle.path, threads=1)
    stream, session = model.stream("abc", **SETTINGS), model.session()
    session.append("abc")
    next(stream)
    chat_like = model.stream("de")
    with model:
        pass
    assert list(stream) == []
    assert stream.completion is not None
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
        assert stream.completion is not None
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

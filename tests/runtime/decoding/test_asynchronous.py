"""Streams in an event loop."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from pastkey.errors import InputError, NumericsError, OptionError
from pastkey.runtime import load

from .batching.waiting import until

SETTINGS: dict[str, Any] = {"max_new_tokens": 25, "temperature": 1.0, "seed": 1, "prompt_lookup": False}


def test_many_tasks_get_the_texts_of_calls_alone(lm):
    prompts = ["a", "bc", "def", "ghij"] * 5
    expected = [lm.generate(prompt, **SETTINGS) for prompt in prompts]

    async def streamed(prompt: str) -> str:
        return "".join([chunk.text async for chunk in lm.astream(prompt, **SETTINGS)])

    async def all_of_them() -> tuple[list[str], list[str]]:
        texts = await asyncio.gather(*map(streamed, prompts))
        completions = await asyncio.gather(*(lm.agenerate(prompt, **SETTINGS) for prompt in prompts))
        return texts, [completion.text for completion in completions]

    assert asyncio.run(all_of_them()) == ([c.text for c in expected], [c.text for c in expected])
    assert lm.scheduler.batched > 100
    assert lm.scheduler.live == 0


@pytest.mark.parametrize("call", ["astream", "agenerate"])
def test_a_cancelled_task_stops_within_one_run(lm, monkeypatch, call):
    """It does not wait for the run, which is the first of three of a prefill, and the loop goes on meanwhile."""
    graph, run, runs = lm.require_open().graph, lm.require_open().graph.run, list[int]()
    inside, go_on = threading.Event(), threading.Event()

    def gate(cache: Any, ids: Any, *arguments: Any) -> Any:
        runs.append(ids.size)
        inside.set()
        assert go_on.wait(60)
        return run(cache, ids, *arguments)

    async def read() -> None:
        if call == "astream":
            async for _ in lm.astream("a" * 590):
                pass
        else:
            await lm.agenerate("a" * 590)

    async def cancel() -> None:
        task = asyncio.create_task(read())
        await asyncio.to_thread(inside.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not go_on.is_set()
        go_on.set()
        await asyncio.to_thread(until, lambda: lm.scheduler.live == 0)

    with monkeypatch.context() as patch:
        patch.setattr(graph, "run", gate)
        asyncio.run(cancel())
    assert len(runs) == 1
    assert runs[0] < 590
    assert lm.generate("abc", **SETTINGS).new_tokens == 25


def test_leaving_and_closing_end_it(lm):
    async def leave() -> list[int]:
        async with lm.astream("abc", **SETTINGS) as stream:
            async for _ in stream:
                break
        assert stream.completion is not None
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        return stream.completion.ids

    assert asyncio.run(leave()) == lm.generate("abc", **SETTINGS).ids[:1]
    assert lm.scheduler.live == 0


def test_errors_come_where_they_belong(lm, monkeypatch):
    with pytest.raises(OptionError, match=r"astream\(\) has no option"):
        lm.astream("abc", temprature=1)
    with pytest.raises(InputError, match="temperature"):
        lm.astream("abc", temperature=-1)

    async def generate() -> None:
        await lm.agenerate("abc")

    def broken(*_: Any) -> None:
        raise NumericsError("not finite")

    monkeypatch.setattr(lm.require_open().graph, "run", broken)
    with pytest.raises(NumericsError, match="not finite"):
        asyncio.run(generate())
    assert lm.scheduler.live == 0


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

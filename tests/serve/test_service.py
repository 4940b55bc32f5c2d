"""Load: the queue, its order, and clients that go away, each with real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pastkey.serve.events import ahead

from ..runtime.conftest import runs_of
from ..runtime.decoding.batching import waiting
from .conftest import Gate, Served, data_of, running

PATH = "/v1/completions"


async def cancelled() -> AsyncIterator[int]:
    yield 1
    raise asyncio.CancelledError


def test_an_answer_whose_source_is_cancelled_ends():
    async def read() -> list[int | None]:
        return [item async for item in ahead(cancelled(), 0.1)]

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(asyncio.wait_for(read(), 5))


def body(prompt: str, tokens: int = 20, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, **more}


def opened(served: Served) -> int:
    activity = served.model.activity
    return activity.running + activity.waiting


def leave(response: http.client.HTTPResponse, client: http.client.HTTPConnection) -> None:
    """Goes away at once, whatever was not read."""
    assert client.sock is not None
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    response.close()
    client.close()


def begun(served: Served, content: dict[str, Any]) -> http.client.HTTPConnection:
    client = served.connection()
    client.request("POST", PATH, json.dumps(content))
    return client


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_text_within_a_step(bundle, monkeypatch, stream):
    with running(bundle) as served:
        gate = Gate(served.model, monkeypatch)
        gate.release(5)
        client = begun(served, body("abc", 500, stream=stream))
        waiting.until(lambda: gate.ran == 5)
        client.close()
        waiting.until(lambda: opened(served) == 0)
        gate.release(100)
        waiting.until(lambda: served.model.scheduler.live == 0)
        assert gate.ran <= 6
        assert served.ask(PATH, body("abc", 3))[0] == 200


def test_a_queued_client_that_leaves_frees_its_place_and_no_others(bundle, monkeypatch):
    with running(bundle, max_concurrency=1, max_queue=2) as served:
        expected = [served.model.generate(prompt, max_new_tokens=20).text for prompt in ("abc", "de")]
        gate = Gate(served.model, monkeypatch)
        with ThreadPoolExecutor(2) as clients:
            first = clients.submit(served.ask, PATH, body("abc"))
            waiting.until(lambda: opened(served) == 1)
            leaver = begun(served, body("lmn", 400, stream=True))
            waiting.until(lambda: opened(served) == 2)
            last = clients.submit(served.ask, PATH, body("de"))
            waiting.until(lambda: opened(served) == 3)
            assert served.ask(PATH, body("x"))[0] == 429
            leaver.close()
            waiting.until(lambda: opened(served) == 2)
            gate.release(10_000)
            texts = [found.result()[1]["choices"][0]["text"] for found in (first, last)]
        assert texts == expected
        assert served.model.activity.requests == 4  # the leaver never began


def test_a_full_queue_is_a_429_that_says_when_to_ask_again(bundle, monkeypatch):
    with running(bundle, max_concurrency=1, max_queue=0) as served:
        gate = Gate(served.model, monkeypatch)
        with ThreadPoolExecutor(1) as clients:
            first = clients.submit(served.ask, PATH, body("abc"))
            waiting.until(lambda: opened(served) == 1)
            with contextlib.closing(served.response(PATH, body("abc"))) as refused:
                assert (refused.status, refused.headers["retry-after"]) == (429, "1")
                assert json.loads(refused.read())["error"]["code"] == "queue_full"
            assert served.ask("/health")[0] == 200
            gate.release(1000)
            assert first.result()[0] == 200


def test_requests_are_answered_in_the_order_of_their_arrival(bundle, monkeypatch):
    prompts = ["ab", "bcd", "cdef", "defgh", "efghil", "fghilmn"]  # each is prefilled in one run of its own length
    with running(bundle, max_concurrency=1, max_queue=8) as served, ThreadPoolExecutor(6) as clients:
        shapes = runs_of(served.model.require_open().graph, monkeypatch)
        gate, found = Gate(served.model, monkeypatch), []
        for prompt in prompts:
            found.append(clients.submit(served.ask, PATH, body(prompt, 2, prompt_lookup=False)))
            waiting.until(lambda: opened(served) == len(found))
        gate.release(1000)
        assert [one.result()[0] for one in found] == [200] * 6
        assert [tokens for _, tokens in shapes if tokens > 1] == [2, 3, 4, 5, 6, 7]


def test_a_reader_that_takes_nothing_holds_no_place(bundle):
    with running(bundle, max_concurrency=1) as served:
        client = begun(served, body("abc", 590, stream=True))  # its events are more than a socket's buffers hold
        waiting.until(lambda: served.model.activity.requests == 1)
        assert served.ask(PATH, body("abc", 3))[0] == 200
        with client.getresponse() as response:
            *chunks, done = data_of(response)
        assert done == "[DONE]"
        assert len(chunks) > 500
        client.close()


def test_a_long_prefill_sends_pings(bundle, monkeypatch):
    with running(bundle, ping_seconds=0.05) as served:
        gate = Gate(served.model, monkeypatch)
        with contextlib.closing(served.response(PATH, body("abc", 2, stream=True))) as response:
            assert [response.readline() for _ in range(3)] == [b": ping\n", b"\n", b": ping\n"]
            gate.release(100)
            assert list(data_of(response))[-1] == "[DONE]"


def test_the_time_of_a_request_ends_its_text(bundle, monkeypatch):
    with running(bundle, timeout=0.2) as served:
        runs_of(served.model.require_open().graph, monkeypatch, 0.01)
        reply = served.ask(PATH, body("abc", 500))[1]
        assert reply["choices"][0]["finish_reason"] == "length"
        assert reply["usage"]["completion_tokens"] < 500


def test_one_request_with_many_prompts_is_never_cut_by_the_queue(bundle):
    with running(bundle, max_concurrency=2, max_queue=0) as served:
        status, reply = served.ask(PATH, {"prompt": ["ab"] * 9, "max_tokens": 2, "n": 2})
        assert (status, [choice["index"] for choice in reply["choices"]]) == (200, list(range(18)))
        assert opened(served) == 0

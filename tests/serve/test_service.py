"""Load: the queue, its order, and clients that go away, each with real sockets."""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from ..runtime.conftest import runs_of
from ..runtime.decoding.batching import waiting
from .conftest import COMPLETIONS, data_of, running


def body(prompt, tokens=20, **more):
    return {"prompt": prompt, "max_tokens": tokens, **more}


def begun(served, content):
    client = served.connection()
    client.request("POST", COMPLETIONS, json.dumps(content))
    return client


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_text_within_a_step(gated, stream):
    with gated() as (served, gate):
        gate.release(5)
        client = begun(served, body("abc", 500, stream=stream))
        waiting.until(lambda: gate.ran == 5)
        client.close()
        waiting.until(lambda: served.opened == 0)
        gate.release(100)
        waiting.until(lambda: served.model.scheduler.live == 0)
        assert gate.ran <= 6
        assert served.ask(COMPLETIONS, body("abc", 3))[0] == 200


def test_a_queued_client_that_leaves_frees_its_place_and_no_others(gated):
    with gated(max_concurrency=1, max_queue=2) as (served, gate):
        with ThreadPoolExecutor(2) as clients:
            first = clients.submit(served.choices, COMPLETIONS, **body("abc"))
            waiting.until(lambda: served.opened == 1)
            leaver = begun(served, body("lmn", 400, stream=True))
            waiting.until(lambda: served.opened == 2)
            last = clients.submit(served.choices, COMPLETIONS, **body("de"))
            waiting.until(lambda: served.opened == 3)
            assert served.ask(COMPLETIONS, body("x"))[0] == 429
            leaver.close()
            waiting.until(lambda: served.opened == 2)
            gate.release(10_000)
            texts = [found.result()[0]["text"] for found in (first, last)]
        assert served.model.activity.requests == 2  # the leaver never began
        assert texts == [served.model.generate(prompt, max_new_tokens=20).text for prompt in ("abc", "de")]


def test_a_full_queue_is_a_429_that_says_when_to_ask_again(gated):
    with gated(max_concurrency=1, max_queue=0) as (served, gate), ThreadPoolExecutor(1) as clients:
        first = clients.submit(served.ask, COMPLETIONS, body("abc"))
        waiting.until(lambda: served.opened == 1)
        with contextlib.closing(served.response(COMPLETIONS, body("abc"))) as refused:
            assert (refused.status, refused.headers["retry-after"]) == (429, "1")
            assert json.loads(refused.read())["error"]["code"] == "queue_full"
        assert served.ask("/health")[0] == 200
        gate.release(1000)
        assert first.result()[0] == 200


def test_requests_are_answered_in_the_order_of_their_arrival(gated, monkeypatch):
    prompts = ["ab", "bcd", "cdef", "defgh", "efghil", "fghilmn"]  # each is prefilled in one run of its own length
    with gated(max_concurrency=1, max_queue=8) as (served, gate), ThreadPoolExecutor(6) as clients:
        shapes, found = runs_of(served.model.require_open().graph, monkeypatch), []
        for prompt in prompts:
            found.append(clients.submit(served.ask, COMPLETIONS, body(prompt, 2, prompt_lookup=False)))
            waiting.until(lambda: served.opened == len(found))
        gate.release(1000)
        assert [one.result()[0] for one in found] == [200] * 6
        assert [tokens for _, tokens in shapes if tokens > 1] == [2, 3, 4, 5, 6, 7]


def test_a_reader_that_takes_nothing_holds_no_place(bundle):
    long = body("abc", 590, stream=True)  # its events are more than a socket's buffers hold
    with running(bundle, max_concurrency=1) as served, served.response(COMPLETIONS, long) as response:
        waiting.until(lambda: served.model.activity.requests == 1)
        assert served.ask(COMPLETIONS, body("abc", 3))[0] == 200
        *chunks, done = data_of(response)
    assert (done, len(chunks) > 500) == ("[DONE]", True)


def test_a_long_prefill_sends_pings(gated):
    asked = body("abc", 2, stream=True)
    with gated(ping_seconds=0.05) as (served, gate), served.response(COMPLETIONS, asked) as response:
        assert [response.readline() for _ in range(3)] == [b": ping\n", b"\n", b": ping\n"]
        gate.release(100)
        assert list(data_of(response))[-1] == "[DONE]"


def test_the_time_of_a_request_ends_its_text(bundle, monkeypatch):
    with running(bundle, timeout=0.2) as served:
        runs_of(served.model.require_open().graph, monkeypatch, 0.01)
        reply = served.ask(COMPLETIONS, body("abc", 500))[1]
        assert reply["choices"][0]["finish_reason"] == "length"
        assert reply["usage"]["completion_tokens"] < 500


def test_one_request_with_many_prompts_is_never_cut_by_the_queue(bundle):
    with running(bundle, max_concurrency=2, max_queue=0) as served:
        choices = served.choices(COMPLETIONS, prompt=["ab"] * 9, max_tokens=2, n=2)
        assert [choice["index"] for choice in choices] == list(range(18))
        assert served.opened == 0

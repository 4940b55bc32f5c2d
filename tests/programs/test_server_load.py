"""`pastkey serve` under many clients at once, of which some go away: nobody's text changes, and nobody's is lost."""

from __future__ import annotations

import http.client
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from .serving import MODEL, serving, write_tiny

pytest.importorskip("starlette", reason="the extra serve is not installed")

pytestmark = pytest.mark.slow

PLACES, QUEUE = 4, 8
PROMPTS = [f"Prompt number {number} says" for number in range(8)]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    flags = ("--alias", MODEL, "--max-concurrency", str(PLACES), "--max-queue", str(QUEUE))
    with serving(write_tiny(folder / "bundle").path, *flags, log=folder / "log") as address:
        yield address
    assert "Traceback" not in (folder / "log").read_text(encoding="utf-8")


def stream(address: str, prompt: str, leave_after: int | None = None) -> str | int | None:
    """The text of a stream, the status of a refusal, or None of a client that goes away after so many events."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)
    body = {"prompt": prompt, "max_tokens": 60, "seed": 1, "ignore_eos": True, "stream": True}
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            return reply.status
        parts: list[str] = []
        for line in reply:
            if line.startswith(b"data: [DONE]"):
                return "".join(parts)
            if line.startswith(b"data: "):
                parts.append(json.loads(line[6:])["choices"][0]["text"])
            if len(parts) == leave_after:
                return None
        raise AssertionError("a stream ended without [DONE]")
    finally:
        connection.close()


@pytest.fixture(scope="module")
def alone(address):
    """The texts of requests that nobody disturbs."""
    return [stream(address, prompt) for prompt in PROMPTS]


def test_clients_that_go_away_change_no_text_of_others(address, alone):
    """Four read, and four leave after 1 to 20 events, beside one another."""
    with ThreadPoolExecutor(8) as pool:
        for turn in range(5):
            read = [pool.submit(stream, address, PROMPTS[turn + place]) for place in range(4)]
            left = [pool.submit(stream, address, PROMPTS[place], 1 + turn * 4 + place) for place in range(4)]
            assert [one.result() for one in read] == alone[turn : turn + 4]
            assert [one.result() for one in left] == [None] * 4
    assert stream(address, PROMPTS[0]) == alone[0]  # those that left hold no place


def test_of_many_requests_those_beyond_the_queue_are_refused_and_none_is_lost(address, alone):
    with ThreadPoolExecutor(100) as pool:
        found = [*pool.map(lambda number: (number % 8, stream(address, PROMPTS[number % 8])), range(100))]
    counts = Counter("right" if text == alone[which] else text for which, text in found)
    assert counts["right"] + counts[429] == 100
    assert counts["right"] >= PLACES + QUEUE
    assert counts[429]

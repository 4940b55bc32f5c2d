"""The protocol of every engine's worker, in its own environment: one JSON request a line in, one JSON reply a line out.

    {"do": "generate", "ids": [...], "new_tokens": N}  ->  {"prefill_seconds", "decode_seconds", "ids": [N new ids]}
    {"do": "logits", "ids": [...], "out": "file.npy"}  ->  {}, and (T, V) float32 in that file
    {"do": "memory"}                                   ->  {"peak_rss_bytes"} of this process so far
    {"do": "streams", "prompts": [[...], ...], "new_tokens": N}
        ->  {"first_seconds", "last_seconds", "ids"}, each a list of one for each prompt: all begin at the same moment

Generation is greedy and continues after end tokens. Its prefill ends with the first new token known, and its decode
feeds N tokens, one by one. The first line out, before any request, holds load_seconds. By its --way, a worker answers
"generate" and "logits", or "streams".
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

os.environ["ORT_DISABLE_TELEMETRY"] = "1"


class Engine(Protocol):
    """Greedy generation, one row."""

    def start(self, ids: list[int], length: int) -> int:
        """Forgets everything, prefills `ids` and returns the next token; `length` tokens will be needed in all."""

    def step(self, token: int) -> int:
        """Appends the token that was returned last, and returns the next one."""

    def logits(self, ids: list[int]) -> Any:
        """(T, V) float32 of one run without a past."""


class Streams(Protocol):
    """Greedy generation behind several prompts at the same time."""

    def streams(self, prompts: list[list[int]], new_tokens: int, told: Callable[[int, int], None]) -> None:
        """Tells each new token as it comes: the place of its prompt, and its id."""


def in_threads(
    stream: Callable[[list[int], int], Iterator[int]],
    prompts: list[list[int]],
    new_tokens: int,
    told: Callable[[int, int], None],
) -> None:
    """`Streams.streams` of an engine that reads one prompt in each thread."""
    together = threading.Barrier(len(prompts))

    def read(place: int) -> None:
        together.wait()
        for token in stream(prompts[place], new_tokens):
            told(place, token)

    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(read, range(len(prompts))))  # raises what one has raised


def serve(**ways: type) -> None:
    """Loads the model that the command line names by the class of its --way, answers until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--way", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True, help="the most tokens that any request will need")
    arguments = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library may print
    imported = time.perf_counter()
    model = ways[arguments.way.replace("-", "_")](arguments.model, arguments.threads, arguments.context)
    reply: dict[str, Any] = {"load_seconds": time.perf_counter() - imported}
    while True:
        print(json.dumps(reply), file=replies, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        reply = _answer(model, json.loads(line))


def _answer(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    match request["do"]:
        case "streams":
            return _streams(model, request["prompts"], request["new_tokens"])
        case "generate":
            return _generate(model, request["ids"], request["new_tokens"])
        case "logits":
            import numpy as np

            np.save(request["out"], np.ascontiguousarray(model.logits(request["ids"]), np.float32))
            return {}
        case "memory":
            return {"peak_rss_bytes": peak_rss_bytes()}
        case unknown:
            raise ValueError(f"no request {unknown!r}")


def _generate(model: Engine, ids: list[int], new_tokens: int) -> dict[str, Any]:
    started = time.perf_counter()
    found = [model.start(ids, len(ids) + new_tokens)]
    prefilled = time.perf_counter()
    while len(found) <= new_tokens:
        found.append(model.step(found[-1]))
    ended = time.perf_counter()
    return {
        "prefill_seconds": prefilled - started,
        "decode_seconds": ended - prefilled,
        "ids": found[:new_tokens],
    }


def _streams(model: Streams, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    seconds: list[list[float]] = [[] for _ in prompts]
    ids: list[list[int]] = [[] for _ in prompts]

    def told(place: int, token: int) -> None:
        seconds[place].append(time.perf_counter() - started)
        ids[place].append(token)

    started = time.perf_counter()
    model.streams(prompts, new_tokens, told)
    return {
        "first_seconds": [of_one[0] for of_one in seconds],
        "last_seconds": [of_one[-1] for of_one in seconds],
        "ids": ids,
    }


def peak_rss_bytes() -> int:
    """VmHWM: ru_maxrss, without the memory that the parent held before this process became its own program."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024

"""What every engine's worker speaks, in its own environment: one JSON request a line in, one JSON reply a line out.

    {"do": "generate", "ids": [...], "new_tokens": N}  ->  {"prefill_seconds", "decode_seconds", "ids": [N new ids]}
    {"do": "logits", "ids": [...], "out": "file.npy"}  ->  {}, and (T, V) float32 in that file
    {"do": "memory"}                                   ->  {"peak_rss_bytes"} of this process so far

Generation is greedy and goes on behind end tokens. Its prefill ends with the first new token known, and its decode
feeds N tokens, one by one. The first line out, before any request, holds load_seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
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


def serve(engine: type) -> None:
    """Loads the engine's model that the command line names, answers until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True, help="the most tokens that any request will need")
    arguments = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no reply
    imported = time.perf_counter()
    model = engine(arguments.model, arguments.threads, arguments.context)
    reply: dict[str, Any] = {"load_seconds": time.perf_counter() - imported}
    while True:
        print(json.dumps(reply), file=replies, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        reply = _answer(model, json.loads(line))


def _answer(model: Engine, request: dict[str, Any]) -> dict[str, Any]:
    match request["do"]:
        case "generate":
            return _generate(model, request["ids"], request["new_tokens"])
        case "logits":
            import numpy as np

            np.save(request["out"], np.ascontiguousarray(model.logits(request["ids"]), np.float32))
            return {}
        case "memory":
            return {"peak_rss_bytes": _peak_rss_bytes()}
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


def _peak_rss_bytes() -> int:
    """VmHWM: what ru_maxrss says, without what the parent held before this process became its own program."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024

"""A pytest plugin for llama.cpp's server tests. Runs in their environment: standard library and pytest alone.

- Leaves out the tests of `left_out`, each with its reason, and those that their own marks call slow.
- Replaces `ServerPreset.load_all`, which downloads models of other architectures.
- A text that llama.cpp's random stream decides is not compared: the test goes on, and counts as `passed but for texts`.
- `/completion` is llama.cpp's own route: what has a field in OpenAI's `/v1/completions` is asked for there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .left_out import LEFT_OUT, RANDOM_TEXTS, SLOW

_results: dict[str, dict[str, str]] = {}
_texts: set[str] = set()  # tests with a text that was not compared
_running = ""


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Marks what is left out, and changes what the tests call."""
    import utils

    utils.ServerPreset.load_all = staticmethod(lambda: None)
    utils.ServerProcess.make_request = _translated(utils.ServerProcess.make_request)
    utils.ServerProcess.make_stream_request = _translated_stream(utils.ServerProcess.make_stream_request)
    utils.ServerProcess.start.__defaults__ = (600,)  # seconds to wait for a server
    compare = _compare(utils.match_regex)
    for item in items:
        if hasattr(item.module, "match_regex"):
            item.module.match_regex = compare
        reasons = [reason for name, reason in LEFT_OUT.items() if re.search(name, item.nodeid)]
        if item.get_closest_marker("slow"):
            reasons.append(SLOW)
        if reasons:
            item.add_marker(pytest.mark.skip(reason=reasons[0]))


def pytest_runtest_logstart(nodeid: str) -> None:
    """Remembers the test that runs."""
    global _running
    _running = nodeid


def pytest_runtest_logreport(report: Any) -> None:
    """Notes the outcome of a test: its worst one."""
    if report.failed:
        _results[report.nodeid] = {"outcome": "failed", "reason": str(report.longrepr).strip().splitlines()[-1]}
    elif report.skipped:
        reason = report.longrepr[2].removeprefix("Skipped: ")
        _results[report.nodeid] = {"outcome": "left out", "reason": reason}
    elif report.when == "call":
        outcome = "passed but for texts" if report.nodeid in _texts else "passed"
        _results[report.nodeid] = {"outcome": outcome, "reason": ""}


def pytest_sessionfinish() -> None:
    """Writes the outcomes."""
    Path(os.environ["PASTKEY_RESULTS"]).write_text(json.dumps(_results, indent=1), encoding="utf-8")


def _compare(match: Callable[[str, str], bool]) -> Callable[[str, str], bool]:
    def compared(regex: str, text: str) -> bool:
        found = match(regex, text)
        if not found and regex in RANDOM_TEXTS:
            _texts.add(_running)
            return True
        return found

    return compared


# --- /completion ----------------------------------------------------------------------------------------------------
_ROUTES = ("/completion", "/completions")  # of llama.cpp; its /v1/completions is OpenAI's


def _asked(server: Any, path: str, data: Any) -> tuple[str, Any]:
    """The request in OpenAI's form."""
    if path not in _ROUTES or not isinstance(data, dict):
        return path, data
    asked = {"max_tokens": server.n_predict, **data}
    if "n_predict" in asked:
        asked["max_tokens"] = asked.pop("n_predict")
    if isinstance(asked.get("logit_bias"), list):
        asked["logit_bias"] = {str(token): bias for token, bias in asked["logit_bias"]}
    return "/v1/completions", asked


def _told(body: Any) -> Any:
    """The answer in llama.cpp's form."""
    if not isinstance(body, dict) or "choices" not in body:
        return body
    usage = body["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    timings = {
        "prompt_n": usage["prompt_tokens"] - cached,
        "cache_n": cached,
        "predicted_n": usage["completion_tokens"],
    }
    told = [{"content": choice["text"], "timings": timings} for choice in body["choices"]]
    return told[0] if len(told) == 1 else told


def _translated(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(self: Any, method: str, path: str, data: Any = None, headers: Any = None, **more: Any) -> Any:
        asked_path, asked = _asked(self, path, data)
        found = make(self, method, asked_path, asked, headers, **more)
        if asked_path != path:
            found.body = _told(found.body)
        return found

    return made


def _translated_stream(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(self: Any, method: str, path: str, data: Any = None, headers: Any = None, **more: Any) -> Iterator[Any]:
        asked_path, asked = _asked(self, path, data)
        for event in make(self, method, asked_path, asked, headers, **more):
            if asked_path == path:
                yield event
            elif event["choices"]:
                yield {"content": event["choices"][0]["text"], "stop": event["choices"][0]["finish_reason"] is not None}

    return made

"""A model to talk with, and `pastkey chat` with what is piped into it."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from pastkey.runtime import load

FLAGS = ["--max-new-tokens", "7", "--temperature", "1", "--seed", "1"]
SETTINGS: dict[str, Any] = {"max_new_tokens": 7, "temperature": 1.0, "seed": 1}


@pytest.fixture(scope="session")
def model(talking):
    return load(talking, threads=1)


@pytest.fixture
def piped(command, monkeypatch):
    """piped(GIVEN, COMMAND, *ARGUMENTS): a command that reads these bytes, on one thread."""

    def run(given: bytes, name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
        found: tuple[int, str, str] = command(name, *arguments, "--threads", 1)
        return found

    return run


def fails(result: tuple[int, str, str], *words: str) -> None:
    """One sentence on standard error, with these words, and exit status 2."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err

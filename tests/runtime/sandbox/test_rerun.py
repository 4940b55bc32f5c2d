from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from typing import Any

import pytest

from pastkey.contract.bundle import Bundle
from pastkey.runtime.sandbox import process

from .conftest import hooked

Command = Callable[..., tuple[int, str, str]]


def test_run_and_chat(command, talking_bundle):
    flags = ("--max-new-tokens", 5, "--threads", 1, "--json")
    for name, prompt in (("run", "hello"), ("chat", "hello")):
        found = [
            command(name, talking_bundle.path, "--prompt", prompt, *flags, *more) for more in ((), ("--untrusted",))
        ]
        assert [status for status, *_ in found] == [0, 0]
        texts = [json.loads(out)["text"] for _, out, _ in found]
        assert texts[0] == texts[1]
    status, out, _ = command("run", talking_bundle.path, "--prompt", "hello", "--untrusted", "--max-new-tokens", 5)
    assert (status, out) == (0, texts_of_run(command, talking_bundle) + "\n")


def texts_of_run(command: Command, bundle: Bundle) -> str:
    _, out, _ = command("run", bundle.path, "--prompt", "hello", "--max-new-tokens", 5, "--json")
    text: str = json.loads(out)["text"]
    return text


def test_inspect_and_bench(command, talking_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    plain, limited = (command("inspect", talking_bundle.path, "--threads", 1, *more) for more in ((), ("--untrusted",)))
    assert limited[:2] == plain[:2]
    assert list(tmp_path.iterdir()) == []
    flags = ("--prompt-tokens", 8, "--new-tokens", 2, "--json", "--untrusted", "--limit", "seconds=100")
    status, out, _ = command("bench", talking_bundle.path, *flags)
    assert status == 0
    assert json.loads(out)["settings"]["prompt_tokens"] == 8


@pytest.mark.parametrize("name", ["run", "inspect"])
def test_a_hostile_bundle_is_one_sentence_and_status_2(command, hostile, name):
    flags = ("--prompt", "hello") if name == "run" else ()
    limits = ("--limit", "seconds=2", "--limit", "memory=400e6")
    status, out, err = command(name, hostile("a loop"), *flags, "--untrusted", *limits)
    assert (status, out.strip()) == (2, "")
    lines = [line for line in err.splitlines() if "not in force" not in line or "gave no answer" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"pastkey {name}: the process of the untrusted bundle ")
    if name == "run":  # a profile of each step takes memory, so that the other limit may come first, in any library
        assert "gave no answer within 2 s, and was ended; " in lines[0]
    assert "limits in force: 2 s for an answer, 400 MB of memory" in lines[0]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--limit", "seconds=2"), "--limit is for a bundle that is not trusted: add --untrusted"),
        (("--untrusted", "--limit", "colour=2"), "--limit colour=2 was given; memory=BYTES or seconds=S was expected"),
        (("--untrusted", "--limit", "memory=much"), "--limit memory=much was given"),
        (("--untrusted", "--limit", "seconds=-1"), "seconds is -1.0"),
        (("--untrusted", "--provider-option", "a=b"), "--provider-option is for an execution provider"),
        (("--untrusted", "--provider", "cuda"), "an untrusted bundle runs on the CPU alone"),
    ],
)
@pytest.mark.parametrize("name", ["run", "bench"])
def test_flags_that_do_not_fit(command, talking_bundle, name, flags, told):
    prompt = ("--prompt", "a") if name == "run" else ()
    status, out, err = command(name, talking_bundle.path, *prompt, *flags)
    assert (status, out) == (2, "")
    assert told in err


def test_what_a_terminal_would_act_on_is_not_printed(command, talking_bundle, monkeypatch):
    hook = "from pastkey.runtime.commands import rerun\n"
    hook += "rerun.run_here = lambda *_, **__: dict(status=77, out='a\\x1b[31mé\\n', error='b\\x07\\n')\n"
    monkeypatch.setattr(process, "BOOT", hooked(hook))
    found: tuple[Any, ...] = command("inspect", talking_bundle.path, "--untrusted")
    assert found[:2] == (2, "a?[31mé\n")
    assert found[2].endswith("b?\n")

"""Rows that a stranger's bundle answers, in the process with limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pastkey.bundle import Bundle
from pastkey.errors import UntrustedBundleError
from pastkey.runtime import Generator
from pastkey.runtime.untrusted import process

from .conftest import EASY

Command = Callable[..., tuple[int, str, str]]


def rows() -> list[dict[str, Any]]:
    """Some begin alike, one is a conversation, one is wrong."""
    long = "the cat and the dog and the bird sat. "
    said = [{"role": "user", "content": "hi"}]
    return [*({"prompt": f"{long}{end}"} for end in "abc"), {"messages": said}, {"prompt": ""}]


def test_rows_are_answered_in_the_process(command: Command, talking_bundle: Bundle, tmp_path: Path) -> None:
    source, answers = tmp_path / "rows.jsonl", []
    source.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    for name, flags in (("here", ()), ("there", ("--untrusted", "--limit", "seconds=60"))):
        out = tmp_path / f"{name}.jsonl"
        status, _, err = command(
            "batch", talking_bundle.path, source, "--out", out, "--threads", 1, "--max-new-tokens", 4, *flags
        )
        assert status == 0, err
        answers.append({row["id"]: row for row in map(json.loads, out.read_text().splitlines())})
    assert answers[0] == answers[1]
    assert [row["id"] for row in answers[1].values() if row["error"] is not None] == ["line-5"]


def test_a_process_that_ends_ends_the_job(
    command: Command, talking_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is no row's own error; nor is the bundle opened here instead."""
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "ab"}\n')
    crash = "import os\nfrom pastkey.runtime.untrusted import server\n"
    crash += "server.Server.do_next = lambda self, stream: os._exit(5)\n"
    boot = process.BOOT.replace("; ", "\n").replace("from pastkey", crash + "from pastkey", 1)
    monkeypatch.setattr(process, "BOOT", boot)
    status, _, err = command("batch", talking_bundle.path, source, "--out", out, "--threads", 1, "--untrusted")
    assert status == 2
    assert "asked for the next token, ended with status 5; limits in force" in err
    assert not out.read_bytes()
    generator = Generator(talking_bundle.path, threads=1, trust=False, limits=EASY)
    with pytest.raises(UntrustedBundleError, match="ended with status 5"):
        generator({"prompt": ["ab"]})
    generator.close()


def test_a_command_that_would_not_heed_a_flag_has_none(command: Command, talking_bundle: Bundle) -> None:
    """`sign` is for one's own bundle, and `batch` has no draft model."""
    for arguments, flag in (
        (("sign", talking_bundle.path, "--key", "key.pem"), ("--untrusted",)),
        (("batch", talking_bundle.path, "in.jsonl", "--out", "out.jsonl"), ("--draft", "b")),
    ):
        status, _, err = command(*arguments, *flag)
        assert status == 2
        assert f"unrecognized arguments: {' '.join(flag)}" in err

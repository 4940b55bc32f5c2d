"""Commands with --untrusted: each runs in a process with limits, and its parent passes on what it prints."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pastkey.errors import InputError
from pastkey.runtime.commands.flags import limits_of
from pastkey.runtime.sandbox.limits import Limits

from ..sandbox import conftest as bundles

acting, hostile, talking_bundle = bundles.acting, bundles.hostile, bundles.talking_bundle
UNTRUSTED = ("--untrusted", "--limit", "seconds=60")


def test_what_limit_says():
    def given(*pairs: tuple[str, str]) -> Limits | None:
        flags = {"untrusted": True, "provider": "cpu", "provider_options": None}
        return limits_of(argparse.Namespace(limits=pairs, **flags))

    assert given() == Limits()
    assert given(("memory", "4e9"), ("seconds", "2.5")) == Limits(4_000_000_000, 2.5)
    with pytest.raises(InputError):
        given(("memory", "inf"))


@pytest.mark.parametrize("name", ["run", "chat"])
def test_run_and_chat_answer_as_without_the_wall(command, talking_bundle, name):
    flags = ("--prompt", "hello", "--max-new-tokens", 5, "--threads", 1)
    plain, limited = (command(name, talking_bundle.path, *flags, *more) for more in ((), UNTRUSTED))
    assert limited[:2] == plain[:2]
    assert plain[0] == 0


def test_inspect_and_bench(command, talking_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    plain, limited = (command("inspect", talking_bundle.path, "--threads", 1, *more) for more in ((), UNTRUSTED))
    assert limited[:2] == plain[:2]
    assert list(tmp_path.iterdir()) == []
    status, out, _ = command(
        "bench", talking_bundle.path, "--prompt-tokens", 8, "--new-tokens", 2, "--json", *UNTRUSTED
    )
    assert status == 0
    assert json.loads(out)["settings"]["prompt_tokens"] == 8


def test_a_hostile_bundle_is_one_sentence_and_status_2(command, hostile):
    limits = ("--limit", "seconds=1", "--limit", "memory=400e6")
    status, out, err = command("run", hostile("a loop"), "--prompt", "hello", "--untrusted", *limits)
    assert (status, out.strip()) == (2, "")
    (line,) = [line for line in err.splitlines() if "not in force" not in line or "gave no answer" in line]
    assert line.startswith("pastkey run: the process of the untrusted bundle ")
    assert "gave no answer within 1 s, and was ended; limits in force: 1 s for an answer, 400 MB of memory" in line


REFUSED = {
    "limits alone": (("--limit", "seconds=2"), "--limit is for a bundle that is not trusted: add --untrusted"),
    "no such limit": (("--untrusted", "--limit", "colour=2"), "--limit colour=2 was given; memory=BYTES or seconds=S"),
    "no number": (("--untrusted", "--limit", "memory=much"), "--limit memory=much was given"),
    "no time": (("--untrusted", "--limit", "seconds=-1"), "seconds is -1.0"),
    "an option": (("--untrusted", "--provider-option", "a=b"), "an untrusted bundle runs on the CPU alone"),
    "a provider": (("--untrusted", "--provider", "cuda"), "an untrusted bundle runs on the CPU alone"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("name", ["run", "bench", "batch"])
def test_flags_that_do_not_fit(command, talking_bundle, tmp_path, name, case):
    (tmp_path / "in.jsonl").write_text('{"prompt": "ab"}\n')
    own = {"run": ("--prompt", "a"), "bench": (), "batch": (tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")}
    flags, words = REFUSED[case]
    status, out, err = command(name, talking_bundle.path, *own[name], *flags)
    assert (status, out) == (2, "")
    assert words in err


def test_the_prompt_of_standard_input(talking_bundle):
    """Whose last line has no end."""
    command = [sys.executable, "-m", "pastkey", "run", talking_bundle.path, "--prompt", "-", "--max-new-tokens", "3"]
    for text in ("hello", "hello\n"):
        plain, limited = (
            subprocess.run([*command, *more], input=text, capture_output=True, text=True, check=True).stdout
            for more in ((), UNTRUSTED)
        )
        assert plain == limited


@pytest.mark.slow
def test_a_conversation_is_not_ended_while_the_user_thinks(talking_bundle):
    command = [sys.executable, "-m", "pastkey", "chat", talking_bundle.path, "--untrusted", "--limit", "seconds=1"]
    with subprocess.Popen([*command, "--max-new-tokens", "3"], stdin=-1, stdout=-1) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        for _ in range(2):
            chat.stdin.write(b"hi\n")
            chat.stdin.flush()
            assert len(chat.stdout.readline().decode()) == 4
            time.sleep(1.5)
        chat.stdin.close()
        assert chat.wait(60) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_at_a_terminal(talking_bundle):
    """The prompt comes without the end of a line, Ctrl-C reaches the process, and Ctrl-D ends."""
    import pty

    pid, terminal = pty.fork()
    if not pid:
        flags = ("chat", str(talking_bundle.path), "--untrusted", "--max-new-tokens", "500", "--min-new-tokens", "400")
        os.execv(sys.executable, [sys.executable, "-m", "pastkey", *flags])
    seen, end = b"", time.monotonic() + 90

    def until(words: bytes) -> None:
        nonlocal seen
        while words not in seen:
            assert select.select([terminal], [], [], max(0, end - time.monotonic()))[0], f"{words!r} not in {seen!r}"
            seen += os.read(terminal, 1000)
        seen = seen.partition(words)[2]

    until(b"ends.\r\n> ")
    os.write(terminal, b"\x03")
    until(b"Ctrl-C once more ends")
    until(b"> ")
    os.write(terminal, b"hello\n")
    until(b"\r\n> ")
    os.write(terminal, b"\x04")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)


@pytest.mark.slow
def test_an_interrupt_reaches_the_process_and_the_third_ends_here(command, talking_bundle, acting):
    acting("print('begun', flush=True)\ntry: time.sleep(99)\nexcept KeyboardInterrupt: print('again', flush=True)")
    run = ("run", talking_bundle.path, "--prompt", "a", "--untrusted")
    with interrupting(1):
        assert command(*run)[:2] == (0, "begun\nagain\n")
    acting("signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True); time.sleep(99)")
    with interrupting(3):
        assert command(*run)[:2] == (130, "begun\n")


@pytest.mark.slow
def test_an_interrupt_before_there_is_a_handler_is_not_the_bundles_fault(command, talking_bundle, acting):
    acting("signal.signal(signal.SIGINT, signal.SIG_DFL); print('begun', flush=True); time.sleep(99)")
    with interrupting(1):
        assert command("run", talking_bundle.path, "--prompt", "a", "--untrusted") == (130, "begun\n", "")


@contextlib.contextmanager
def interrupting(times: int) -> Iterator[None]:
    """Presses Ctrl-C so many times, once a process runs."""

    def press() -> None:
        for _ in range(times):
            time.sleep(3)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    yield
    thread.join()


# --- a process that was taken over --------------------------------------------------------------------------------
def test_what_a_terminal_would_act_on_is_not_printed(command, talking_bundle, acting):
    acting("print('a\\x1b[31mé\\x9b\\r', flush=True); print('b\\x07', file=sys.stderr, flush=True); os._exit(1)")
    assert command("inspect", talking_bundle.path, "--untrusted") == (1, "a�[31mé��\n", "b�\n")


PRINTED = {
    "print('x' * 10_000_000)": (0, 10_000_001, ""),
    "while True: print('x' * 100_000)": (2, 16_000_000, "printed more than 16,000,000 bytes, and was ended"),
    "while True: print('x' * 100, file=sys.stderr)": (2, 0, "printed more than 16,000,000 bytes, and was ended"),
    "frame(b'o', 'é'.encode()[:1]); os.kill(0, signal.SIGKILL)": (2, 1, "was ended by SIGKILL"),
    "raw(b'o\\x09\\0\\0\\0ab'); os._exit(0)": (0, 2, ""),
    "os._exit(77)": (2, 0, "ended with status 77; limits in force"),
    "while True: frame(b'p'); time.sleep(0.02)": (2, 0, "gave no answer within 1 s, and was ended"),
    "time.sleep(99)": (2, 0, "gave no answer within 1 s, and was ended"),
    "while True: frame(b'?'); time.sleep(0.2)": (2, 0, "asked for a line of input, and was ended"),
}


@pytest.mark.parametrize("program", PRINTED)
def test_what_a_process_prints_and_how_it_ends(command, talking_bundle, acting, monkeypatch, program):
    status, length, words = PRINTED[program]
    seconds = "seconds=1" if "sleep" in program else "seconds=30"
    acting(program)
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        found = command("run", talking_bundle.path, "--prompt", "a", "--untrusted", "--limit", seconds)
    assert found[0] == status
    assert length - 2_000_000 < len(found[1]) <= length
    assert words in found[2]
    assert not found[1] or set(found[1]) <= set("x\nab�")


# --- rows of a batch ----------------------------------------------------------------------------------------------
def test_rows_are_answered_in_the_process(command, talking_bundle, tmp_path):
    """Some begin alike, one is a conversation, one is wrong."""
    long, said = "the cat and the dog and the bird sat. ", [{"role": "user", "content": "hi"}]
    rows: list[Any] = [*({"prompt": f"{long}{end}"} for end in "abc"), {"messages": said}, {"prompt": ""}]
    source, template, answers = tmp_path / "rows.jsonl", tmp_path / "own.jinja", []
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template.write_text("{{ messages[0].content }}")
    for name, more in (("here", ()), ("there", UNTRUSTED)):
        out = tmp_path / f"{name}.jsonl"
        flags = ("--threads", 1, "--max-new-tokens", 4, "--template", template)
        status, _, err = command("batch", talking_bundle.path, source, "--out", out, *flags, *more)
        assert status == 0, err
        answers.append({row["id"]: row for row in map(json.loads, out.read_text().splitlines())})
    assert answers[0] == answers[1]
    assert [row["id"] for row in answers[1].values() if row["error"] is not None] == ["line-5"]


BEGUN = "input = sys.stdin.buffer; print(json.dumps({'digest': 'x'}), flush=True); input.readline()\n"
HONEST = "dict(id='line-1', text='a', finish_reason='stop', prompt_tokens=1, new_tokens=1, error=None)"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("os._exit(5)", "ended with status 5"),
        ("", "left rows without an answer"),
        (f"print(json.dumps({HONEST.replace('line-1', 'line-3')}))", "answered a row that was not asked for"),
        (f"print(json.dumps({HONEST})); print(json.dumps({HONEST}))", "answered a row that was not asked for"),
        (f"print(json.dumps({HONEST.replace('text=', 'b=5, text=')}))", "gave an answer that is none (an answer has"),
        (f"print(json.dumps({HONEST.replace(repr('line-1'), '[1]')}))", "answered a row that was not asked for"),
        ("print('x' * 17_000_000)", "gave an answer of more than 16,000,000 bytes"),
        ("print('{', flush=True); time.sleep(99)", "gave an answer that is none ("),
        ("time.sleep(99)", "gave no answer within 2 s"),
    ],
)
def test_a_process_that_was_taken_over_ends_the_job(command, talking_bundle, tmp_path, acting, program, words):
    """And is no row's own error; nor is the bundle opened here instead."""
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "ab"}\n{"prompt": "b"}\n')
    acting(BEGUN + program)
    flags = ("--exact", "--untrusted", "--limit", "seconds=2")
    status, _, err = command("batch", talking_bundle.path, source, "--out", out, "--threads", 1, *flags)
    assert status == 2
    assert words in err
    assert len(out.read_text().splitlines()) == (program.count(HONEST) == 2)  # the first of them was written


def test_a_row_is_sent_after_all_before_it_were_answered(command, talking_bundle, tmp_path, acting):
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "ab"}\n{"prompt": "b"}\n')
    second = HONEST.replace("line-1", "line-2")
    acting(BEGUN + "".join(f"print(json.dumps({one}), flush=True); input.readline()\n" for one in (HONEST, second)))
    assert command("batch", talking_bundle.path, source, "--out", out, "--untrusted")[0] == 0
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["line-1", "line-2"]


def test_rows_are_lines_of_the_process(command, talking_bundle, tmp_path, acting):
    """It asks for no line that is not a row, and its control characters stay in JSON."""
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "ab"}\n')
    acting(BEGUN + f"print(json.dumps({HONEST.replace(repr('a'), repr(chr(27)))})); print(repr(input.readline()))")
    assert command("batch", talking_bundle.path, source, "--out", out, "--untrusted")[0] == 0
    assert json.loads(out.read_text())["text"] == "\x1b"
    assert "\x1b" not in out.read_text()


@pytest.mark.parametrize(
    "arguments", [("sign", "b", "--key", "k.pem", "--untrusted"), ("batch", "b", "in.jsonl", "--out", "o", "--draft=b")]
)
def test_a_command_that_would_not_heed_a_flag_has_none(command, arguments):
    """`sign` is for one's own bundle, and `batch` has no draft model."""
    status, _, err = command(*arguments)
    assert (status, f"no flag {arguments[-1].partition('=')[0]}" in err) == (2, True)

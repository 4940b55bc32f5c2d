"""Commands with --untrusted: each runs in a process with limits, and its parent passes on its output."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from pastkey.runtime.commands.flags import limits_of
from pastkey.runtime.sandbox.limits import Limits

from ..bulk.rows import read_rows
from ..sandbox import conftest as bundles

acting = bundles.acting
UNTRUSTED = ("--untrusted", "--limit", "seconds=60")


def test_what_limit_says():
    given = {"untrusted": True, "provider": "cpu", "provider_options": None}
    for pairs, limits in (((), Limits()), ((("memory", "4e9"), ("seconds", "2.5")), Limits(4_000_000_000, 2.5))):
        assert limits_of(argparse.Namespace(limits=pairs, **given)) == limits


PROMPT = ("--prompt", "hello", "--max-new-tokens", 5)


@pytest.mark.parametrize(("name", "flags"), [("run", PROMPT), ("chat", PROMPT), ("inspect", ())])
def test_a_command_prints_what_it_prints_without_the_wall(command, talking, name, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    plain, limited = (command(name, talking, "--threads", 1, *flags, *more) for more in ((), UNTRUSTED))
    assert limited[:2] == plain[:2]
    assert plain[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_bench(command, talking):
    flags = ("--prompt-tokens", 8, "--new-tokens", 2, "--json", *UNTRUSTED)
    status, out, _ = command("bench", talking, *flags)
    assert (status, json.loads(out)["settings"]["prompt_tokens"]) == (0, 8)


def test_the_prompt_of_standard_input(talking):
    """Whose last line has no end."""
    command = [sys.executable, "-m", "pastkey", "run", talking, "--prompt", "-", "--max-new-tokens", "3"]
    plain, *limited = (
        subprocess.run([*command, *more], input=text, capture_output=True, text=True, check=True).stdout
        for more, text in (((), "hello"), (UNTRUSTED, "hello"), (UNTRUSTED, "hello\n"))
    )
    assert limited == [plain, plain]


@pytest.mark.slow
def test_a_conversation_is_not_ended_while_the_user_thinks(talking):
    command = [sys.executable, "-m", "pastkey", "chat", talking, "--untrusted", "--limit", "seconds=1"]
    with subprocess.Popen([*command, "--max-new-tokens", "3"], stdin=-1, stdout=-1) as chat:
        for _ in range(2):
            chat.stdin.write(b"hi\n")
            chat.stdin.flush()
            assert len(chat.stdout.readline().decode()) == 4
            time.sleep(1.5)
        chat.stdin.close()
        assert chat.wait(60) == 0


@contextlib.contextmanager
def interrupting(times):
    """Presses Ctrl-C so many times, once a process runs."""

    def press():
        for _ in range(times):
            time.sleep(3)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    yield
    thread.join()


STAYS = "print('begun', flush=True); time.sleep(99)"
INTERRUPTED = {  # the number of interrupts, the status, and the output
    f"try: {STAYS}\nexcept KeyboardInterrupt: print('again', flush=True)": (1, 0, "begun\nagain\n"),
    f"signal.signal(signal.SIGINT, signal.SIG_IGN); {STAYS}": (3, 130, "begun\n"),  # the third ends here
    f"signal.signal(signal.SIGINT, signal.SIG_DFL); {STAYS}": (1, 130, "begun\n"),  # before there is a handler
}


@pytest.mark.slow
@pytest.mark.parametrize("program", INTERRUPTED)
def test_an_interrupt_reaches_the_process_and_is_not_the_bundles_fault(command, talking, acting, program):
    times, status, out = INTERRUPTED[program]
    acting(program)
    with interrupting(times):
        found = command("run", talking, "--prompt", "a", "--untrusted")
    assert found[:2] == (status, out)
    assert "the untrusted bundle" not in found[2]


# --- a hijacked process -------------------------------------------------------------------------------------------
def test_what_a_terminal_would_act_on_is_not_printed(command, talking, acting):
    acting("print('a\\x1b[31mé\\x9b\\r', flush=True); print('b\\x07', file=sys.stderr, flush=True); os._exit(1)")
    assert command("inspect", talking, "--untrusted") == (1, "a�[31mé��\n", "b�\n")


PRINTED = {
    "print('x' * 10_000_000)": (0, 10_000_001, ""),
    "while True: print('x' * 100_000)": (2, 16_000_000, "printed more than 16,000,000 bytes, and was ended"),
    "while True: print('x' * 100, file=sys.stderr)": (2, 0, "printed more than 16,000,000 bytes, and was ended"),
    "frame(b'o', 'é'.encode()[:1]); os.kill(0, signal.SIGKILL)": (2, 1, "was ended by SIGKILL"),
    "raw(b'o\\x09\\0\\0\\0ab'); os._exit(0)": (0, 2, ""),
    "os._exit(77)": (2, 0, "ended with status 77; limits in force"),
    "while True: frame(b'p'); time.sleep(0.02)": (
        2,
        0,
        "gave no answer within 1 s, and was ended; limits in force: 1 s",
    ),
    "while True: frame(b'?'); time.sleep(0.2)": (2, 0, "asked for a line of input, and was ended"),
}


@pytest.mark.parametrize("program", PRINTED)
def test_what_a_process_prints_and_how_it_ends(command, talking, acting, monkeypatch, program):
    status, length, words = PRINTED[program]
    seconds = "seconds=1" if "sleep" in program else "seconds=30"
    acting(program)
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        found = command("run", talking, "--prompt", "a", "--untrusted", "--limit", seconds)
    assert (found[0], words in found[2]) == (status, True)
    assert not words or "pastkey run: the process of the untrusted bundle " in found[2]
    assert length - 2_000_000 < len(found[1]) <= length
    assert not found[1] or set(found[1]) <= set("x\nab�")


# --- rows of a batch ----------------------------------------------------------------------------------------------
def test_rows_are_answered_in_the_process(batch, tmp_path, out):
    """Some begin alike, one is a conversation, one is wrong."""
    long, said = "the cat and the dog and the bird sat. ", [{"role": "user", "content": "hi"}]
    rows = [*({"prompt": f"{long}{end}"} for end in "abc"), {"messages": said}, {"prompt": ""}]
    template, there = tmp_path / "own.jinja", tmp_path / "there.jsonl"
    template.write_text("{{ messages[0].content }}")
    for target, more in ((out, ()), (there, UNTRUSTED)):
        assert batch(rows, "--template", template, *more, out=target)[0] == 0
    assert {row["id"]: row for row in read_rows(out)} == {row["id"]: row for row in read_rows(there)}
    assert [row["id"] for row in read_rows(out) if row["error"] is not None] == ["line-5"]


BEGUN = "input = sys.stdin.buffer; print(json.dumps({'digest': 'x'}), flush=True); input.readline()\n"
HONEST = "dict(id='line-1', text='a', finish_reason='stop', prompt_tokens=1, new_tokens=1, error=None)"
ROWS = [{"prompt": "ab"}, {"prompt": "b"}]


TAKEN_OVER = [
    ("", "left rows without an answer"),
    (f"print(json.dumps({HONEST.replace('line-1', 'line-3')}))", "answered a row that was not asked for"),
    (f"print(json.dumps({HONEST})); print(json.dumps({HONEST}))", "answered a row that was not asked for"),
    (f"print(json.dumps({HONEST.replace('text=', 'b=5, text=')}))", "gave an invalid answer (an answer has"),
    (f"print(json.dumps({HONEST.replace(repr('line-1'), '[1]')}))", "answered a row that was not asked for"),
    ("print('x' * 17_000_000)", "gave an answer of more than 16,000,000 bytes"),
    ("print('{', flush=True); time.sleep(99)", "gave an invalid answer ("),
    ("time.sleep(99)", "gave no answer within 2 s"),
]


@pytest.mark.parametrize(("program", "words"), TAKEN_OVER)
def test_a_process_that_was_taken_over_ends_the_job(batch, acting, out, program, words):
    """And is no row's own error; nor is the bundle opened here instead."""
    acting(BEGUN + program)
    status, _, err = batch(ROWS, "--exact", "--untrusted", "--limit", "seconds=2")
    assert (status, words in err) == (2, True)
    assert len(read_rows(out)) == (program.count(HONEST) == 2)  # the first of them was written


def test_a_row_is_sent_after_all_before_it_were_answered_and_no_line_that_is_no_row(batch, acting, out):
    """The control characters of an answer stay in JSON."""
    first, second = HONEST.replace(repr("a"), repr(chr(27))), HONEST.replace("line-1", "line-2")
    acting(f"""{BEGUN}print(json.dumps({first}), flush=True); input.readline()
print(json.dumps({second}), flush=True); print(repr(input.readline()))""")
    assert batch(ROWS, "--untrusted")[0] == 0
    assert [(row["id"], row["text"]) for row in read_rows(out)] == [("line-1", "\x1b"), ("line-2", "a")]

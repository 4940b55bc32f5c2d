"""What a process may do that was taken over: say anything, say nothing, end in any way."""

from __future__ import annotations

import contextlib
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from pastkey.errors import InputError, UntrustedBundleError
from pastkey.runtime.sandbox import process
from pastkey.runtime.sandbox.connection import Connection
from pastkey.runtime.sandbox.frames import failure_of
from pastkey.runtime.sandbox.limits import Limits

from .conftest import has_ended

# Answers the first question as it should, then runs what stands behind it with `say(content)`.
ANSWERING = """
import json, os, signal, struct, sys, time
def say(content):
    text = json.dumps(content).encode() if isinstance(content, dict) else content
    os.write(1, struct.pack("<I", len(text)) + text)
def ask():
    (length,) = struct.unpack("<I", sys.stdin.buffer.read(4))
    return json.loads(sys.stdin.buffer.read(length))["id"]
say({"id": ask(), "value": {"seconds": 5.0, "memory": 1000, "landlock": 7, "missing": []}})
"""
LIMITS = Limits(seconds=20.0)


@dataclass(frozen=True)
class Text:
    """The answer that is expected."""

    text: str


def children() -> list[str]:
    """The processes that this one has started and that were not waited for."""
    found: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that ends
            found += (task / "children").read_text().split()
    return sorted(found)


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No descriptor, no thread, no process."""

    def held() -> tuple[int, int, list[str]]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), children()

    before = held()
    yield
    assert held() == before


@pytest.fixture
def connected(monkeypatch):
    """connected(PROGRAM, LIMITS): the way to a process that runs it."""
    made: list[Connection] = []

    def start(program: str, limits: Limits = LIMITS) -> Connection:
        monkeypatch.setattr(process, "BOOT", ANSWERING + program)
        made.append(Connection(Path("b"), limits))
        return made[-1]

    yield start
    for one in made:
        one.close()


ENDED = {
    "ask(); say(b'no json'); time.sleep(99)": "answered with a message is not valid JSON",
    "ask(); say(b'[1]'); time.sleep(99)": "answered with a message that is not an object",
    "ask(); os.write(1, b'abc'); os._exit(0)": "answered with a message that was cut short",
    "ask(); os.write(1, b'\\xff' * 4); time.sleep(99)": "answered with a message of 4,294,967,295 bytes, and was ended",
    "ask(); say({'id': 2, 'value': [], 'x': 1}); time.sleep(99)": "answered with a message that is none (a message",
    "ask(); say({'id': 2, 'value': {'text': 5}}); time.sleep(99)": "gave an answer that is none (text is 5",
    "ask(); say({'id': 9, 'value': {}}); time.sleep(99)": "answered with a message that nobody asked for, and was",
    "ask(); os.kill(os.getpid(), signal.SIGSEGV)": "was ended by SIGSEGV",
    f"ask(); os.kill(os.getpid(), {signal.SIGRTMIN + 5})": "was ended by signal ",
    "ask(); os._exit(3)": "ended with status 3",
    "ask(); os.close(1); time.sleep(99)": "was ended by SIGKILL",
    "time.sleep(99)": "gave no answer within 1 s, and was ended",
}


@pytest.mark.parametrize("program", ENDED)
def test_a_process_that_does_not_answer_is_ended_with_a_sentence(connected, program):
    made = connected(program, Limits(seconds=1.0) if program == "time.sleep(99)" else LIMITS)
    with pytest.raises(UntrustedBundleError) as first:
        made.call("for a text", "text", Text, {"much": "x" * 1_000_000})  # more than a pipe holds
    begin = "the process of the untrusted bundle b, asked for a text, "
    sentence = str(first.value)
    assert sentence.startswith(begin + ENDED[program])
    assert "; limits in force: 5 s for an answer, 0 MB of memory, no files but its own and the libraries" in sentence
    with pytest.raises(UntrustedBundleError) as later:
        made.call("again", "text", Text, {})
    assert str(later.value) == sentence.replace(", asked for a text,", "")


def test_what_it_started_ends_with_it(connected, tmp_path):
    told = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(pid))"
    made = connected(f"ask()\npid = os.fork()\nif pid: {told}; os._exit(4)\ntime.sleep(99)", Limits(seconds=1.0))
    with pytest.raises(UntrustedBundleError, match="ended"):
        made.call("for a text", "text", Text, {})
    assert has_ended(int((tmp_path / "pid").read_text()))


def test_one_that_does_not_start(monkeypatch):
    monkeypatch.setattr(process, "BOOT", "raise SystemExit(5)")
    with pytest.raises(UntrustedBundleError, match=r"b(, asked to start,)? ended with status 5; limits in force: 20 s"):
        Connection(Path("b"), LIMITS)


def test_errors_are_sentences_of_known_classes(connected):
    answers = [
        ("InputError", "odd\x1b[31m text\n", "odd [31m text ", InputError),
        ("ContextLengthError", "x", "fails (x); limits in force", UntrustedBundleError),
        ("SystemExit", "x", "fails (x); limits in force", UntrustedBundleError),
        ("memory", "bad_alloc", r"has not the memory (bad_alloc); limits in force", UntrustedBundleError),
        ("InputError", "x" * 10_000, "x" * 4000, InputError),
    ]
    program = "".join(
        f"\nsay({{'id': ask(), 'failure': {{'kind': {kind!r}, 'sentence': {sentence!r}}}}})"
        for kind, sentence, *_ in answers
    )
    made = connected(program + "\nask()")
    for _, _, words, kind in answers:
        with pytest.raises(kind) as found:
            made.call("for a text", "text", Text, {})
        assert words in str(found.value)
        assert len(str(found.value)) <= 4000
    assert failure_of(KeyError("x")) == {"kind": "fault", "sentence": "KeyError: 'x'"}
    assert failure_of(RuntimeError("can't start new thread"))["kind"] == "memory"

"""What a process may do that was taken over: say anything, say nothing, end in any way."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from pastkey.errors import InputError, UntrustedBundleError
from pastkey.runtime.sandbox import connection, process
from pastkey.runtime.sandbox.connection import Connection
from pastkey.runtime.sandbox.limits import Limits

from .conftest import children, descriptors, has_ended

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


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No descriptor, no thread, no process."""
    before = descriptors(), threading.active_count(), children()
    yield
    assert (descriptors(), threading.active_count(), children()) == before


def ended(monkeypatch: pytest.MonkeyPatch, program: str, limits: Limits = LIMITS) -> str:
    """The sentence of a call to a process that runs this program."""
    monkeypatch.setattr(process, "BOOT", ANSWERING + program)
    made = Connection(Path("b"), limits)
    try:
        with pytest.raises(UntrustedBundleError) as first:
            made.call("for a text", "text", Text, {})
        with pytest.raises(UntrustedBundleError) as later:
            made.call("again", "text", Text, {})
        assert str(later.value) == str(first.value).replace(", asked for a text,", "")
    finally:
        made.close()
    sentence = str(first.value)
    assert sentence.startswith("the process of the untrusted bundle b, asked for a text, ")
    assert "; limits in force: 5 s for an answer, 0 MB of memory, no files but its own and the libraries" in sentence
    return sentence.removeprefix("the process of the untrusted bundle b, asked for a text, ").partition(";")[0]


NONSENSE = {
    "say(b'no json')": "answered with a message is not valid JSON",
    "say(b'[1]')": "answered with a message that is not an object",
    "os.write(1, b'hello world, this is no message')": "answered with a message of ",
    "os.write(1, b'abc'); os._exit(0)": "answered with a message that was cut short",
    "os.write(1, b'\\xff' * 4)": "answered with a message of 4,294,967,295 bytes, and was ended",
    "say(b'[' * 100000 + b']' * 100000)": "answered with a message is not valid JSON (nested more than 100 deep)",
    "say({'id': 'two'})": "answered with a message that is none (id is 'two'",
    "say({'id': 2, 'value': [], 'x': 1})": "answered with a message that is none (a message has an unknown key 'x'",
    "say({'id': 2, 'value': {'text': 5}})": "gave an answer that is none (text is 5",
    "say({'id': 2, 'value': {'text': 'a', 'more': 1}})": "gave an answer that is none (the answer has an unknown key",
    "say(b'{\"id\": 2, \"value\": {\"text\": \"\\\\ud800\"}}')": "answered with a message is not valid JSON (half ",
    "say({'id': 1, 'value': {'text': 'a'}})": "answered with a message that nobody asked for, and was ended",
    "say({'id': 9, 'value': {'text': 'a'}})": "answered with a message that nobody asked for, and was ended",
}  # fmt: skip


@pytest.mark.parametrize("program", NONSENSE)
def test_nonsense(program, monkeypatch):
    found = ended(monkeypatch, f"ask(); {program}; time.sleep(1000)")
    assert found.startswith(NONSENSE[program])


def test_ends(monkeypatch):
    assert ended(monkeypatch, "ask(); os.kill(os.getpid(), signal.SIGSEGV)") == "was ended by SIGSEGV"
    assert ended(monkeypatch, "ask(); os.abort()") == "was ended by SIGABRT"
    assert ended(monkeypatch, "ask(); os.kill(os.getpid(), signal.SIGKILL)") == "was ended by SIGKILL"
    assert ended(monkeypatch, "ask(); os._exit(3)") == "ended with status 3"
    assert ended(monkeypatch, f"ask(); os.kill(os.getpid(), {signal.SIGRTMIN + 5})").startswith("was ended by signal ")
    assert ended(monkeypatch, "ask(); os.close(1); time.sleep(1000)") == "was ended by SIGKILL"


def test_silence(monkeypatch):
    """Also of one that does not read what it is asked."""
    told = "gave no answer within 1 s, and was ended"
    assert ended(monkeypatch, "time.sleep(1000)", Limits(seconds=1.0)) == told
    monkeypatch.setattr(process, "BOOT", ANSWERING + "time.sleep(1000)")
    made = Connection(Path("b"), Limits(seconds=1.0))
    with pytest.raises(UntrustedBundleError, match=told):
        made.call("for much", "text", Text, {"much": "x" * 10_000_000})
    made.close()


def test_what_it_started_ends_with_it(monkeypatch, tmp_path):
    told = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(pid))"
    program = f"ask()\npid = os.fork()\nif pid: {told}; os._exit(4)\ntime.sleep(1000)"
    assert "ended" in ended(monkeypatch, program, Limits(seconds=3.0))
    assert has_ended(int((tmp_path / "pid").read_text()))


def test_one_that_does_not_start(monkeypatch):
    monkeypatch.setattr(process, "BOOT", "raise SystemExit(5)")
    with pytest.raises(UntrustedBundleError, match=r"b(, asked to start,)? ended with status 5; limits in force: 20 s"):
        Connection(Path("b"), LIMITS)
    monkeypatch.setattr(process, "BOOT", "import time; time.sleep(1000)")
    monkeypatch.setattr(connection, "_START", 0.5)
    with pytest.raises(UntrustedBundleError, match=r"b, asked to start, gave no answer within 0\.6 s, and was ended"):
        Connection(Path("b"), Limits(seconds=0.6))


@pytest.mark.parametrize("number", [1, 2])
def test_no_room_for_a_thread(monkeypatch, number):
    start, begun = threading.Thread.start, []

    def refused(self: threading.Thread) -> None:
        if self.name == "pastkey-untrusted":
            begun.append(self)
            if len(begun) == number:
                raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refused)
    monkeypatch.setattr(process, "BOOT", "import time; time.sleep(1000)")
    with pytest.raises(UntrustedBundleError, match=r"cannot be started \(can't start new thread\): free memory"):
        Connection(Path("b"), LIMITS)


def test_errors_are_sentences_of_known_classes(monkeypatch):
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
    monkeypatch.setattr(process, "BOOT", ANSWERING + program + "\nask()")
    made = Connection(Path("b"), LIMITS)
    for _, _, told, kind in answers:
        with pytest.raises(kind) as found:
            made.call("for a text", "text", Text, {})
        assert told in str(found.value)
        assert len(str(found.value)) <= 4000
    made.close()


def test_calls_of_many_threads_each_get_their_own_answer(monkeypatch):
    """Here in the reverse order."""
    program = (
        "\nasked = [ask() for _ in range(8)]\nfor i in asked[::-1]: say({'id': i, 'value': {'text': str(i)}})\nask()"
    )
    monkeypatch.setattr(process, "BOOT", ANSWERING + program)
    made = Connection(Path("b"), LIMITS)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: made.call("for", "text", Text, {}).text, range(8)))
    assert sorted(found) == [str(number) for number in range(2, 10)]
    made.close()
    assert made.closed


def test_what_cannot_be_sent(monkeypatch):
    monkeypatch.setattr(process, "BOOT", ANSWERING + "ask()")
    made = Connection(Path("b"), LIMITS)
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (object(), 10**5000, deep):
        with pytest.raises(InputError, match="cannot be sent to the process of an untrusted bundle"):
            made.call("for", "text", Text, {"value": value})
    while deep:  # or its own end would be a deep recursion
        deep = deep[0]  # type: ignore[assignment]
    made.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_fork_of_the_parent_has_no_process(monkeypatch):
    monkeypatch.setattr(process, "BOOT", ANSWERING + "\nsay({'id': ask(), 'value': {'text': 'well'}})\nask()")
    made = Connection(Path("b"), LIMITS)
    pid = os.fork()
    if not pid:
        try:
            made.close()  # does nothing
            made.call("for a text", "text", Text, {})
        except InputError as error:
            os._exit(7 if "this process was forked" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert made.call("for a text", "text", Text, {}).text == "well"
    made.close()


def test_an_interrupted_call_leaves_the_next_one_in_step(monkeypatch):
    """The answer that nobody waits for any more is taken as it was asked for, a long one."""
    program = "\ntime.sleep(1.0)\nsay({'id': ask(), 'value': {'text': 'x' * 20_000_000}})\n"
    program += "say({'id': ask(), 'value': {'text': 'well'}})\nask()"
    monkeypatch.setattr(process, "BOOT", ANSWERING + program)
    made = Connection(Path("b"), LIMITS)
    old = signal.signal(signal.SIGALRM, lambda *_: signal.default_int_handler(signal.SIGINT, None))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            made.call("for a long text", "text", Text, {}, most=30_000_000)
    finally:
        signal.signal(signal.SIGALRM, old)
    assert made.call("for a text", "text", Text, {}).text == "well"
    assert not made._calls
    made.close()

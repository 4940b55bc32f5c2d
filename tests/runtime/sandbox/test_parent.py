"""What a process may do that was taken over: say anything, say nothing, end in any way."""

from __future__ import annotations

import contextlib
import signal
import threading
from pathlib import Path

import pytest

from pastkey.errors import InputError, UntrustedBundleError
from pastkey.runtime.sandbox import process
from pastkey.runtime.sandbox.calls import answer
from pastkey.runtime.sandbox.frames import END
from pastkey.runtime.sandbox.limits import Limits
from pastkey.runtime.sandbox.parent import LimitedProcess

from .conftest import has_ended

LIMITS = Limits(seconds=20.0)


def children():
    """The processes that this one has started and that were not waited for."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that ends
            found += (task / "children").read_text().split()
    return sorted(found)


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No descriptor, no thread, no process."""

    def held():
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), children()

    before = held()
    yield
    assert held() == before


def read(bundle, limits=LIMITS):
    """Reads a process to its end. Returns its exit status."""
    with LimitedProcess(answer, {"much": "x" * 1_000_000}, bundle, limits) as started:  # more than a pipe holds
        while started.next()[0] != END:
            pass
        return started.status()


ENDED = {
    "raw(b'no frame'); time.sleep(99)": "answered with a message that is none, and was ended",
    "raw(b'o\\xff\\xff\\xff\\xff'); time.sleep(99)": "answered with a message that is none, and was ended",
    "frame(b'<', b'a line'); time.sleep(99)": "answered with a message that is none, and was ended",
    "frame(b'l', b'{}'); time.sleep(99)": "answered with a message that is none",  # a second time
    "os.kill(os.getpid(), signal.SIGSEGV)": "was ended by SIGSEGV",
    f"os.kill(os.getpid(), {signal.SIGRTMIN + 5})": "was ended by signal ",
    "frames._target.close(); time.sleep(99)": "lives on after its end, and was ended",
    "time.sleep(99)": "gave no answer within 1 s, and was ended",
}


@pytest.mark.parametrize("program", ENDED)
def test_a_process_that_does_not_answer_is_ended_with_a_sentence(acting, talking_bundle, program):
    acting(program)
    with pytest.raises(UntrustedBundleError) as found:
        read(talking_bundle.path, Limits(seconds=1.0) if program == "time.sleep(99)" else LIMITS)
    begin = f"the process of the untrusted bundle {talking_bundle.path} {ENDED[program]}"
    assert str(found.value).startswith(begin)
    assert "; limits in force: " in str(found.value)


def test_what_it_started_ends_with_it(acting, talking_bundle, capfd):
    """The pipe that its copy holds, too, keeps nobody waiting."""
    acting("pid = os.fork()\nif pid: frame(b'o', str(pid).encode()); os._exit(4)\ntime.sleep(99)")
    with LimitedProcess(answer, {}, talking_bundle.path, Limits(seconds=1.0)) as started:
        kind, content = started.next()
        with pytest.raises(UntrustedBundleError, match="gave no answer within 1 s"):
            started.next()
    assert kind == b"o"
    assert has_ended(int(content))


def test_one_that_does_not_start_or_cannot_be_sent_what_was_given(monkeypatch, talking_bundle):
    with pytest.raises(InputError, match=r"cannot be sent to the process of an untrusted bundle \(.* give smaller or"):
        LimitedProcess(answer, {"a": object()}, talking_bundle.path, LIMITS)
    monkeypatch.setattr(process, "BOOT", "raise SystemExit(1)")
    with pytest.raises(UntrustedBundleError, match="ended with status 1; limits in force: 20 s"):
        read(talking_bundle.path)

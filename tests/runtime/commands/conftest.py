"""A model to talk with, and a command with piped input, or at a terminal."""

import io
import os
import select
import sys
import time
from typing import Any

import pytest

from pastkey.runtime import load

from ..bulk.rows import write_rows

FLAGS = ("--max-new-tokens", "7", "--temperature", "1", "--seed", "1")
BATCH = ("--threads", "1", "--temperature", "1", "--max-new-tokens", "9")
SETTINGS: dict[str, Any] = {"max_new_tokens": 7, "temperature": 1.0, "seed": 1}


@pytest.fixture(scope="session")
def model(talking):
    return load(talking, threads=1)


@pytest.fixture
def piped(command, monkeypatch):
    """piped(GIVEN, COMMAND, *ARGUMENTS): a command that reads these bytes, on one thread."""

    def run(given, name, *arguments):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
        return command(name, *arguments, "--threads", 1)

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


@pytest.fixture
def batch(command, talking, tmp_path, out):
    """batch(ROWS, *FLAGS): the result of the command, which writes to `out` or another file."""

    def run(rows, *flags, out=out):
        return command("batch", talking, write_rows(tmp_path / "in.jsonl", rows), "--out", out, *BATCH, *flags)

    return run


def fails(result, *words):
    """One sentence on standard error, with these words, and exit status 2."""
    status, out, err = result
    assert (status, out, err.count("\n")) == (2, "", 1)
    for word in words:
        assert word in err


class Terminal:
    """A command on a separate terminal."""

    def __init__(self, *arguments):
        import pty

        # Tests that run in the background of a shell, as in CI, hand on that Ctrl-C is ignored.
        code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        code += "import sys\nfrom pastkey.__main__ import main\nsys.exit(main(sys.argv[1:]))"
        self.seen, environment = "", os.environ | {"TERM": "dumb", "INPUTRC": os.devnull}
        self.pid, self.ours = pty.fork()
        if not self.pid:
            os.execve(sys.executable, [sys.executable, "-c", code, *map(str, arguments)], environment)

    def until(self, text):
        """The output up to and with `text`, since the last time."""
        end = time.monotonic() + 90
        while text not in self.seen:
            assert select.select([self.ours], [], [], max(0, end - time.monotonic()))[0], self.seen
            self.seen += os.read(self.ours, 4096).decode().replace("\r\n", "\n")
        shown, _, self.seen = self.seen.partition(text)
        return shown + text

    def type(self, text):
        os.write(self.ours, text.encode())

    def press(self):
        """Ctrl-C, once readline waits for input."""
        time.sleep(0.5)
        self.type("\x03")

    def end(self):
        """The exit status."""
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.ours)
        return os.waitstatus_to_exitcode(status)

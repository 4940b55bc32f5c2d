"""A whole command in the process of an untrusted bundle: its parent passes on its output, and lines of input."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Final

from pastkey.command import print_text, without_control

from .frames import END, ERROR, LINE, OUT, PROGRESS
from .limits import Limits
from .parent import LimitedProcess

MOST_PRINTED: Final = 16_000_000  # bytes for each line of input
_FILES: Final = ("template", "json_schema", "grammar")  # arguments that name files which the command reads
_INPUT: Final = b"<"  # a line that was read here, as a frame


def run_limited(
    name: str,
    run: Callable[[argparse.Namespace], int],
    arguments: argparse.Namespace,
    limits: Limits,
    *,
    tokens: int = 0,
    lines: bool = False,
) -> int:
    """Runs a command on the bundle of `arguments` in a process with limits. Returns its exit status.

    Args:
        name: The command's.
        run: The command that it runs.
        arguments: Its arguments.
        limits: Its limits.
        tokens: How many tokens it may make for each line of input, each in the time of the limits; without them this
            is the time of the whole command.
        lines: Whether it reads standard input.

    Raises:
        UntrustedBundleError: It broke a limit, crashed, or ended in no way that a command does.
    """
    given, readable = limited_arguments(arguments)
    process = LimitedProcess(
        run,
        given,
        arguments.bundle,
        limits,
        prog=f"pastkey {name}",
        terminals=(sys.stdin.isatty(), sys.stdout.isatty()),
        readable=readable,
    )
    with process, _interrupting(process) as presses:
        return _relay(process, tokens, presses, lines)


def limited_arguments(arguments: argparse.Namespace) -> tuple[dict[str, object], list[str]]:
    """The arguments for the process, and the files that it has to read for them."""
    given = {**vars(arguments), "untrusted": False, "limits": None, "provider": "cpu"}
    readable = []
    for name in _FILES:
        if given.get(name) is not None:
            given[name] = str(Path(given[name]).absolute())
            readable.append(given[name])
    return given, readable


class Printer:
    """Prints the text of a process, without control characters and no more than a number of bytes.

    Attributes:
        left: The bytes that may still come.
    """

    def __init__(self, process: LimitedProcess, most: int = MOST_PRINTED) -> None:
        self._process, self._most, self.left = process, most, most
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = {OUT: decoder("replace"), ERROR: decoder("replace")}

    def print(self, kind: bytes, content: bytes) -> None:
        """Prints a frame of the kind OUT or ERROR."""
        self.left -= len(content)
        if self.left < 0:
            self._process.fail(f"printed more than {self._most:,} bytes, and was ended")
        self._show(kind, self._decoders[kind].decode(content))

    def finish(self) -> None:
        """Prints a replacement character for one that is not whole at the end."""
        for kind, decoder in self._decoders.items():
            self._show(kind, decoder.decode(b"", final=True))

    def _show(self, kind: bytes, text: str) -> None:
        if kind == OUT:
            print_text(without_control(text))
        elif text:
            print(without_control(text), end="", file=sys.stderr, flush=True)


def _relay(process: LimitedProcess, tokens: int, presses: list[int], lines: bool) -> int:
    printer, left, typed = Printer(process), tokens, _Typed()
    waits = False  # whether a line is read, or all were
    while (found := process.next())[0] != END:
        kind, content = found
        if kind in (OUT, ERROR):
            printer.print(kind, content)
        elif kind == PROGRESS and left:
            left -= 1
            process.allow(process.seconds)
        elif kind == LINE and not lines:
            process.fail("asked for a line of input, and was ended")
        elif kind == LINE and not waits:
            waits = True
            process.allow(None)  # the user's time
            threading.Thread(target=lambda: process.put(_INPUT, typed.line()), daemon=True).start()
        elif kind == _INPUT:
            left, printer.left = tokens, MOST_PRINTED
            waits = not content.endswith(b"\n")
            presses.clear()
            process.allow(process.seconds)
            process.send(content)
            if waits:
                process.send(b"")
    printer.finish()
    return process.status(interrupted=bool(presses))


class _Typed:
    """Lines of standard input. Read from its descriptor: Python's own buffer has a lock, held while a program ends."""

    def __init__(self) -> None:
        self._rest = b""

    def line(self) -> bytes:
        """The next line; b"" at the end."""
        with contextlib.suppress(OSError, ValueError):
            while b"\n" not in self._rest and (piece := os.read(sys.stdin.fileno(), 1 << 16)):
                self._rest += piece
        line, end, self._rest = self._rest.partition(b"\n")
        return line + end


@contextlib.contextmanager
def _interrupting(process: LimitedProcess) -> Iterator[list[int]]:
    """Passes Ctrl-C on, and at the third one without a line of input in between, ends here. Yields those so far."""
    pressed: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        if len(pressed) > 2:
            signal.default_int_handler(number, frame)
        process.interrupt()

    if threading.current_thread() is not threading.main_thread():  # Python handles signals only in that thread
        yield pressed
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)

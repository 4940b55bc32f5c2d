"""`pastkey serve --untrusted`: a process with limits serves the bundle, and its parent ends it if it hangs.

The parent listens and hands the socket over, since the process may bind and connect nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Annotated, Final

from pastkey.errors import InputError, IntegrityError
from pastkey.files.reading import parse_json
from pastkey.runtime.sandbox.frames import END, ERROR, OUT
from pastkey.runtime.sandbox.limits import Limits
from pastkey.runtime.sandbox.parent import LimitedProcess
from pastkey.runtime.sandbox.relay import Printer, limited_arguments
from pastkey.typed import Between, parse

from .guard import salted
from .settings import ServerSettings

_HEALTH: Final = b"h"  # a reply of /health, as a frame
_EVERY: Final = 1.0  # seconds between two questions
_LONGEST: Final = 10_000  # bytes of a reply
_PRINTED: Final = 1_000_000  # bytes between two replies
_ENDING: Final = 10.0  # seconds to end in addition to those for running requests


@dataclasses.dataclass(frozen=True)
class _Health:
    """The messages of the process about itself: they can shorten its life, not lengthen it."""

    status: str
    busy: bool
    steps: Annotated[int, Between(0, 2**63 - 1)]


def supervise(
    run: Callable[[argparse.Namespace], int],
    arguments: argparse.Namespace,
    settings: ServerSettings,
    listening: socket.socket,
    limits: Limits,
) -> int:
    """Has a process `run` the server until SIGTERM or Ctrl-C. Returns the exit status.

    Raises UntrustedBundleError for a process that breaks a limit or crashes, that does not answer /health for as long
    as the limit of time says, or whose step is longer.
    """
    if os.name != "posix":
        raise InputError("--untrusted serves on Linux and macOS only: other systems cannot pass a socket to a process")
    salt = secrets.token_hex(16)
    given, _ = limited_arguments(arguments)
    given |= {
        "alias": settings.names,
        "api_key_file": None,
        "keys": [salted(key.encode(errors="surrogateescape"), salt) for key in settings.keys],
        "salt": salt if settings.keys else "",
        "socket": listening.fileno(),
    }
    process = LimitedProcess(
        run, given, arguments.bundle, limits, prog="pastkey serve", descriptors=[listening.fileno()]
    )
    watched = _watched(process, settings.host, listening.getsockname()[1])
    with watched, process, _signals(process, settings) as ending:
        listening.close()
        printer, steps, moved = Printer(process, _PRINTED), -1, time.monotonic()
        while (found := process.next())[0] != END:
            kind, content = found
            if kind in (OUT, ERROR):
                printer.print(kind, content)
            if kind != _HEALTH or ending:
                continue
            try:
                health = parse(_Health, parse_json(content, "health"), "health")
            except (InputError, IntegrityError) as error:
                process.fail(f"gave an invalid answer ({error}), and was ended")
            if not health.busy or health.steps != steps:
                steps, moved = health.steps, time.monotonic()
            if time.monotonic() - moved > limits.seconds:
                process.fail(f"made no step within {limits.seconds:g} s, and was ended", limit=True)
            printer.left = _PRINTED
            process.allow(limits.seconds)
        printer.finish()
        status = process.status(interrupted=bool(ending))
        return 0 if signal.SIGTERM in ending else status


@contextlib.contextmanager
def _watched(process: LimitedProcess, host: str, port: int) -> Iterator[None]:
    """Asks for /health again and again, over one connection."""
    ended = threading.Event()
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    connection = http.client.HTTPConnection(address, port, timeout=process.seconds)

    def ask() -> None:
        while not ended.wait(min(_EVERY, process.seconds / 4)):
            try:
                connection.request("GET", "/health")
                reply = connection.getresponse()
                content = reply.read(_LONGEST)
            except (OSError, http.client.HTTPException):
                connection.close()
                continue
            if reply.status == 200 and not ended.is_set():  # until the bundle is loaded it is another one
                process.put(_HEALTH, content)
        connection.close()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_ENDING)


@contextlib.contextmanager
def _signals(process: LimitedProcess, settings: ServerSettings) -> Iterator[list[int]]:
    """Passes SIGTERM and Ctrl-C on; a second one ends the process. Yields those that came."""
    came: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        process.interrupt(signal.SIGKILL if came else number)
        process.allow(settings.drain_seconds + _ENDING)
        came.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

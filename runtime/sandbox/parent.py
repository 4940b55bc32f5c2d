"""The process of an untrusted bundle, as its parent has it: started, read, given lines, and ended.

A thread writes and a thread reads, so that a process that hangs delays nobody for longer than the limit.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn, Self

from pastkey.errors import InputError, IntegrityError, LimitWarning, UntrustedBundleError
from pastkey.files.folder import require_manifest
from pastkey.files.reading import parse_json
from pastkey.typed import parse

from ..model.unpack import TemporaryFolder, given_as
from .frames import INVALID, LIMITS, read_frames
from .limits import Limits, LimitsInForce
from .process import libraries, started

_START: Final = 60.0  # seconds for Python and its libraries, at least: nothing of the bundle is open then
_ENDING: Final = 3.0  # seconds until a killed process has to be gone
_GLANCE: Final = 1.0  # seconds after which this thread looks up: a signal may have come to another one
_STATUSES: Final = (0, 1, 2, 130)  # of a command
_TOLD: Final = (2, 130)  # of one that has printed why it ends
_AHEAD: Final = 16  # frames that are read ahead


class LimitedProcess:
    """A process that puts limits on itself, and then runs one function of pastkey with a bundle.

    No file of the bundle is read here: the process unpacks a zip file to a temporary folder, and a resource that is not
    a file is copied.

    Attributes:
        in_force: Its limits.
        seconds: The limit of time.
    """

    def __init__(
        self,
        run: Callable[..., int],
        given: Mapping[str, Any],
        bundle: object,
        limits: Limits,
        *,
        prog: str = "pastkey",
        terminals: tuple[bool, bool] = (False, False),
        readable: Sequence[str] = (),
        descriptors: Sequence[int] = (),
    ) -> None:
        """Starts it.

        Args:
            run: The function, which the process finds by its name and calls with a namespace of `given` and the bundle.
            given: The arguments of the function, of JSON's types.
            bundle: As for `load`.
            limits: Its limits.
            prog: The beginning of its errors.
            terminals: Whether its input, and its output, are a terminal.
            readable: Further files that it may read.
            descriptors: Sockets that it inherits.

        Raises:
            UntrustedBundleError: This program has no Python to start it with.
            OSError, RuntimeError: The system could not start it, or a thread for it.
            TypeError, ValueError: `given` has something that is not of JSON's types.
            InputError: `bundle` is none.
        """
        found = given_as(bundle)
        if found.path.suffix == ".gguf":  # told by the name: no file is read here
            require_manifest(found.path, "bundle")
        path, unpack_to, self._temporary = found.path.absolute(), None, found.temporary
        if path.is_file():
            self._temporary = self._temporary or TemporaryFolder()
            (self._temporary.path / "unpacked").mkdir()
            unpack_to = str(self._temporary.path / "unpacked")
        job = {
            "run": f"{run.__module__}:{run.__qualname__}",
            "given": given,
            "prog": prog,
            "terminals": terminals,
            "memory": None if limits.memory is None else int(limits.memory),
            "seconds": float(limits.seconds),
            "path": str(path),
            "name": found.name,
            "unpack_to": unpack_to,
            "libraries": libraries()[1] + [[file, "read"] for file in readable],
        }
        sent = json.dumps(job).encode() + b"\n"
        self._name, self.seconds = found.name, limits.seconds
        self.in_force = LimitsInForce(limits.seconds, None, 0, ("those that its process sets itself",))
        self._process, self._lifeline = started(found.name, descriptors)
        self._frames: queue.Queue[tuple[bytes, bytes]] = queue.Queue(_AHEAD)
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._closed = self._begun = False
        self.allow(max(_START, limits.seconds))
        self.send(sent)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._read, self._write)]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError:  # no room for one
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- its messages -------------------------------------------------------------------------------------------------
    def allow(self, seconds: float | None) -> None:
        """Gives it so many seconds from now on; None for no limit."""
        self._allowed = seconds
        self._until = None if seconds is None else time.monotonic() + seconds
        self._late = 0  # frames that came after that

    def next(self) -> tuple[bytes, bytes]:
        """The kind and the content of its next message; at the end END. A LimitWarning says which limits it lacks.

        Raises UntrustedBundleError where it says nothing in the time, or nothing that has sense.
        """
        while True:
            left = _GLANCE if self._until is None else self._until - time.monotonic()
            frame: tuple[bytes, bytes] | None = None
            with contextlib.suppress(queue.Empty):
                frame = self._frames.get(timeout=max(0.0, min(left, _GLANCE)))
            self._late += left <= 0
            if self._late > (0 if frame is None else _AHEAD + 1):  # they were read ahead, as while this was stopped
                self.fail(f"gave no answer within {self._allowed:g} s, and was ended", limit=True)
            if frame is None:
                continue
            kind, content = frame
            if kind == INVALID or (kind == LIMITS and self._begun):
                self.fail("sent an invalid message, and was ended")
            if kind != LIMITS:
                return kind, content
            self._begin(content)

    def _begin(self, content: bytes) -> None:
        """Reads which limits it has put on itself. Its messages from now on may be the bundle's."""
        try:
            self.in_force = parse(LimitsInForce, parse_json(content, "its limits"), "its limits")
        except (InputError, IntegrityError) as error:
            self.fail(f"gave an invalid answer ({error}), and was ended")
        if self.in_force.missing:
            warnings.warn(f"{self._name}: {self.in_force}", LimitWarning, stacklevel=2)
        self._begun = True
        self.allow(self.seconds)

    def put(self, kind: bytes, content: bytes) -> None:
        """Lets `next` return this, from any thread."""
        self._frames.put((kind, content))

    def status(self, *, interrupted: bool = False) -> int:
        """Its exit status, at the end. Raises UntrustedBundleError unless it is one of a command.

        A process that the user has `interrupted` may end by a signal at any moment: then it is that of an interrupt.
        """
        try:
            found = self._process.wait(_ENDING)
        except subprocess.TimeoutExpired:
            self.fail("did not end after its last answer, and was ended")
        if interrupted and (found < 0 or found == 128 + signal.SIGTERM):
            return 130
        if found < 0:
            self.fail(f"was ended by {_signal_name(-found)}", limit=True)
        if found not in (_STATUSES if self._begun else _TOLD):
            self.fail(f"ended with status {found}", limit=True)
        return found

    def fail(self, reason: str, *, limit: bool = False) -> NoReturn:
        """Ends it. Raises UntrustedBundleError. `limit`: a higher one of time or memory may help."""
        self.close()
        higher = ", or try again with higher limits if you trust it" if limit else ""
        raise UntrustedBundleError(
            f"the process of the untrusted bundle {self._name} {reason}; {self.in_force}: do not use it{higher}"
        )

    # --- messages to it ----------------------------------------------------------------------------------------------
    def send(self, line: bytes) -> None:
        """Sends a line; b"" says that there are no more. Never waits."""
        self._lines.put(line)

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """Sends a signal to it and to processes that it may have started."""
        with contextlib.suppress(OSError):
            if os.name == "posix":
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)

    def close(self) -> None:
        """Ends it, and removes its files."""
        if self._closed:
            return
        self._closed = True
        # Of one that has ended, processes that it started: no other group has its number as long as one of these lives.
        self.interrupt(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        self._process.wait()
        self.send(b"")
        until = time.monotonic() + _ENDING
        for thread in self._threads:
            while thread.is_alive() and time.monotonic() < until:
                with contextlib.suppress(queue.Empty):
                    self._frames.get_nowait()
                thread.join(0.01)
        if self._lifeline is not None:
            os.close(self._lifeline)
        if self._temporary is not None:
            self._temporary.remove()

    # --- the two threads ----------------------------------------------------------------------------------------------
    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError), self._process.stdout as stream:
            for frame in read_frames(stream):  # type: ignore[arg-type]
                self._frames.put(frame)

    def _write(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError), self._process.stdin as stream:  # the reader tells why it is gone
            while line := self._lines.get():
                stream.write(line)
                stream.flush()


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"

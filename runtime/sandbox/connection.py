"""The way to an untrusted bundle's process: it is started, asked, waited for, and ended.

A thread writes and a thread reads, so that a process that stands still holds nobody up for longer than the limit says.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import queue
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from pastkey import errors
from pastkey.errors import InputError, PastkeyError, UntrustedBundleError
from pastkey.files.reading import parse_json
from pastkey.typed import parse

from .frames import MalformedError, message, read_frame, write_frame
from .limits import Limits, LimitsInForce
from .process import libraries, started
from .protocol import MOST_JSON, Failure, Reply

T = TypeVar("T")
_START: Final = 60.0  # seconds for Python and its libraries, at least: nothing of the bundle is open then
_ENDING: Final = 5.0  # seconds that a process which was killed may take to be gone
_LONGEST: Final = 4000  # characters of a sentence


@dataclass
class _Call:
    """Who waits for a reply, or did until it was interrupted, and how long it may be.

    What a Future waits by makes a RuntimeError of an interrupt that comes as it wakes up; a SimpleQueue does not.
    """

    most: int  # bytes of JSON
    replies: queue.SimpleQueue[Reply | None] = field(default_factory=queue.SimpleQueue)  # None: ended


class Connection:
    """A process that has put limits on itself, and has opened nothing yet.

    Attributes:
        in_force: Its limits.
        seconds: How long it may take for an answer.
        closed: Whether `close` was called.
    """

    def __init__(
        self,
        path: Path,
        limits: Limits,
        *,
        name: str | None = None,
        unpack_to: Path | None = None,
        scratch: Path | None = None,
        readable: Sequence[str] = (),
    ) -> None:
        """Starts it.

        Args:
            path: The bundle, or a zip file of one; with `unpack_to` the bundle is what will be there.
            limits: What it may take.
            name: What errors call it; its path by default.
            unpack_to: An empty folder that it may write to until it has put the limits on itself.
            scratch: An empty folder that it may write to for as long as it lives.
            readable: Further files that it may read.

        Raises:
            UntrustedBundleError: It could not be started, or does not answer.
        """
        self._name, self.seconds = name or str(path), limits.seconds
        self.in_force = LimitsInForce(limits.seconds, None, 0, ("what its process was to put on itself",))
        self._lock = threading.RLock()  # a collector may close this in whichever thread holds it
        self._calls: dict[int, _Call] = {}
        self._numbers = itertools.count(1)
        self.closed = False
        self._ended: str | None = None
        self._gone = False
        self._pid = os.getpid()
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._process, self._lifeline = started(self._name)
        _connections.add(self)
        self._threads = [
            threading.Thread(target=work, name="pastkey-untrusted", daemon=True) for work in (self._read, self._write)
        ]
        try:
            try:
                for thread in self._threads:
                    thread.start()
            except RuntimeError as error:  # no room for one
                raise UntrustedBundleError(
                    f"the process of the untrusted bundle {self._name} cannot be started ({error}): free memory, or "
                    "end other processes"
                ) from None
            asked = {
                "memory": None if limits.memory is None else int(limits.memory),
                "seconds": float(limits.seconds),
                "path": str(path),
                "name": self._name,
                "unpack_to": None if unpack_to is None else str(unpack_to),
                "scratch": None if scratch is None else str(scratch),
                "libraries": libraries()[1] + [[place, "read"] for place in readable],
            }
            self.in_force = self.call("to start", "limits", LimitsInForce, asked, seconds=max(_START, limits.seconds))
        except BaseException:
            self.close()
            raise

    # --- calls --------------------------------------------------------------------------------------------------------
    def call(
        self,
        doing: str,
        what: str,
        kind: type[T],
        given: Mapping[str, Any],
        *,
        most: int = MOST_JSON,
        seconds: float | None = None,
    ) -> T:
        """Asks, and waits for the answer.

        Args:
            doing: What it is asked for, for a sentence: "for the next token".
            what: Which of the calls of server.py.
            kind: The type of the answer, as `parse` takes it.
            given: What the call takes.
            most: Bytes of JSON that the answer may have.
            seconds: How long to wait; None as long as the limit says.

        Raises:
            PastkeyError: What the process says of the call, by its class.
            UntrustedBundleError: It came to an end, now or before: it broke a limit, crashed, or gave no answer.
        """
        call = _Call(most)
        seconds = self.seconds if seconds is None else seconds
        self._ask(what, given, call)
        try:
            found = call.replies.get(timeout=seconds)
        except queue.Empty:
            self._end(f"gave no answer within {seconds:g} s, and was ended")
            found = call.replies.get()  # None, unless it came in this very moment
        if found is None:
            raise self._error(doing)
        if found.failure is not None:
            raise self._failure(found.failure, doing)
        try:
            return parse(kind, found.value, "the answer")
        except InputError as error:
            self._end(f"gave an answer that is none ({error}), and was ended")
            raise self._error(doing) from None

    def run(
        self,
        doing: str,
        function: Callable[..., Any],
        kind: type[T],
        given: Mapping[str, Any],
        **bounds: Any,
    ) -> T:
        """What a function of pastkey returns in the process, called with the bundle's path and `given`.

        `bounds` are those of `call`.
        """
        return self.call(doing, "run", kind, {"function": name_of(function), "arguments": given}, **bounds)

    def results(
        self,
        doing: str,
        function: Callable[..., Iterator[Any]],
        kind: type[T],
        given: Mapping[str, Any],
        **bounds: Any,
    ) -> Iterator[T]:
        """As `run`, of a function that yields: each result has the bounds."""
        job = next(numbers)
        self.call(doing, "begin", Any, {"number": job, "function": name_of(function), "arguments": given})
        more: Any = kind | None
        while (found := self.call(doing, "more", more, {"number": job}, **bounds)) is not None:
            yield found

    def tell(self, what: str, **given: Any) -> None:
        """Asks for something that has no answer. Never waits, and never raises: a collector may call it."""
        self._queue.put(message({"id": 0, "what": what, "given": given}))

    def require_alive(self) -> None:
        """Raises UntrustedBundleError where the process has ended, InputError in a process that was forked."""
        if os.getpid() != self._pid:
            raise InputError(
                "this process was forked, and the process of an untrusted bundle answers the one that started it: load "
                "the bundle here"
            )
        if self._ended is not None:
            raise self._error()

    def fail(self, reason: str) -> NoReturn:
        """Ends the process for what it said. Raises UntrustedBundleError."""
        self._end(reason)
        raise self._error()

    def _ask(self, what: str, given: Mapping[str, Any], call: _Call) -> None:
        self.require_alive()
        number = next(self._numbers)
        try:
            sent = message({"id": number, "what": what, "given": given}, ascii_only=True)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"what was given cannot be sent to the process of an untrusted bundle ({error}): give "
                "smaller or plainer values"
            ) from None
        with self._lock:
            self._calls[number] = call
        self._queue.put(sent)
        if self._ended is not None:  # meanwhile
            self._fail_all()

    def _failure(self, failure: Failure, doing: str) -> PastkeyError:
        sentence = "".join(c if c.isprintable() else " " for c in failure.sentence)[:_LONGEST]
        if failure.kind == "memory":
            return UntrustedBundleError(
                f"the process of the untrusted bundle {self._name}, asked {doing}, has not the memory ({sentence}); "
                f"{self.in_force}: do not use it, or raise memory where it is known to be good"
            )
        kind = _kinds().get(failure.kind)
        if kind is None:
            return UntrustedBundleError(
                f"the process of the untrusted bundle {self._name}, asked {doing}, fails ({sentence}); {self.in_force}"
                ": do not use it"
            )
        return kind(sentence)

    # --- the end ------------------------------------------------------------------------------------------------------
    def drop_lifeline(self) -> None:
        """Closes what tells the process that this one lives."""
        lifeline, self._lifeline = self._lifeline, None
        if lifeline is not None:
            os.close(lifeline)

    def close(self) -> None:
        """Ends the process, and lets go of all that belongs to it. In a process that was forked it does nothing."""
        if os.getpid() != self._pid:
            return
        self.closed = True
        self._end("was ended by close()")
        for thread, work in zip(self._threads, (self._read, self._write), strict=True):
            if thread.ident is None:  # no room for it: its work, which ends with the process, is done here
                work()
            elif thread is not threading.current_thread():
                thread.join(_ENDING)

    def _error(self, doing: str | None = None) -> UntrustedBundleError:
        return UntrustedBundleError(
            f"the process of the untrusted bundle {self._name}{f', asked {doing},' if doing else ''} {self._ended}; "
            f"{self.in_force}: do not use it, or load it again with higher limits where it is known to be good"
        )

    def _end(self, reason: str) -> None:
        with self._lock:
            if self._ended is None:
                self._ended = reason
        self._kill()
        self._fail_all()

    def _kill(self) -> None:
        """Ends the process and what it may have started, as long as its number is not another's."""
        with self._lock:
            if not self._gone:
                with contextlib.suppress(OSError):
                    if os.name == "posix":
                        os.killpg(self._process.pid, signal.SIGKILL)
                    else:
                        self._process.kill()

    def _fail_all(self) -> None:
        with self._lock:
            calls = list(self._calls.values())
        for call in calls:
            call.replies.put(None)

    # --- the two threads ----------------------------------------------------------------------------------------------
    def _write(self) -> None:
        stream = self._process.stdin
        assert stream is not None
        try:
            while (sent := self._queue.get()) is not None:
                write_frame(stream, sent)  # type: ignore[arg-type]
        except (OSError, ValueError):  # the reader tells why it is gone
            pass
        finally:
            with contextlib.suppress(OSError):
                stream.close()

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        reason = None
        try:
            while (found := read_frame(stream, _parsed, self._most)) is not None:  # type: ignore[arg-type]
                self._take(found)
        except MalformedError as error:
            reason = f"answered with {' '.join(str(error).split())[:200]}, and was ended"
        except MemoryError:
            reason = "answered with more than there is memory for, and was ended"
        except Exception as error:  # of the system, or a fault here: nobody may wait for ever
            reason = f"could not be read from ({type(error).__name__}: {error}), and was ended"
        finally:
            self._clear_away(reason)
            with contextlib.suppress(OSError):
                stream.close()

    def _clear_away(self, reason: str | None) -> None:
        """Waits for the end of the process, and says why it came."""
        if reason is not None:
            self._end(reason)
        self._kill()  # of one that ends, what it has started
        with self._lock:
            self._gone = True
        self._end(_ended_by(self._process.wait()))
        self._queue.put(None)
        self.drop_lifeline()

    def _most(self) -> int:
        """Bytes of the longest answer that is waited for."""
        with self._lock:
            return max((call.most for call in self._calls.values()), default=MOST_JSON)

    def _take(self, content: Mapping[str, Any]) -> None:
        try:
            reply = parse(Reply, content, "a message")
        except InputError as error:
            raise MalformedError(f"a message that is none ({error})") from None
        with self._lock:
            call = self._calls.pop(reply.id, None)  # also that of a caller who was interrupted
        if call is None:
            raise MalformedError("a message that nobody asked for")
        call.replies.put(reply)


numbers = itertools.count(1)  # of streams, chat formats and jobs, for all processes


def name_of(function: Callable[..., Any]) -> str:
    """What the server finds a function of pastkey by."""
    return f"{function.__module__}:{function.__qualname__}"


_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _drop_lifelines() -> None:
    """In a fork, which would keep the processes of its parent beyond the parent's end."""
    for connection in list(_connections):
        connection.drop_lifeline()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_lifelines)


def _parsed(text: bytes) -> Any:
    return parse_json(text, "a message")


def _ended_by(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"


@functools.cache
def _kinds() -> Mapping[str, Callable[[str], PastkeyError]]:
    """The errors that a process may name: those that are made of a sentence alone."""
    found = {
        name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, PastkeyError)
    }
    del found["ContextLengthError"]
    return found

"""Turns: one generation at a time on a model, and the others in order of arrival."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator

from pastkey.errors import InputError

LOOK_SECONDS = 0.1  # how often whoever waits looks at who has the turn
PATIENCE_SECONDS = 3.0  # how long a thread waits for another one to go on with the stream that it advanced itself


def _is_alive(thread: threading.Thread) -> bool:
    """Whether it runs. Of a thread that `threading` did not start, it only knows the number."""
    if isinstance(thread, threading._DummyThread):
        return thread.ident in sys._current_frames()
    return thread.is_alive()


class Turn:
    """A place in the queue. It belongs to a generation, whichever threads advance it."""

    def __init__(self) -> None:
        self.over = False
        self.thread = threading.current_thread()  # the last to advance it
        self.gate = threading.Lock()  # shut until it is this one's turn
        self.gate.acquire()

    def resume(self) -> None:
        """Goes on in this thread. Raises InputError where the turn was passed on since the last thread ended."""
        if self.over:
            raise InputError(
                "the thread that advanced this stream has ended, and its turn went to another generation that waited: "
                "begin the stream again, and advance it in threads that live"
            )
        self.thread = threading.current_thread()


class Turns:
    """A fair lock whose owner is a generation and not a thread.

    The first of the queue has the turn. It lets go when it leaves `take`, when it is collected, and when the thread
    that last advanced it has ended while others wait. There is no lock around the queue, because a collector may end a
    generation at any moment, within these methods too: each step is atomic, and may be done twice.
    """

    def __init__(self) -> None:
        self._queue: deque[weakref.ref[Turn]] = deque()

    @contextlib.contextmanager
    def take(self) -> Iterator[Turn]:
        """Waits for a turn and holds it. Raises InputError where this thread would wait for itself."""
        turn = Turn()
        try:
            self._queue.append(weakref.ref(turn))
            self._pass_on()
            self._wait(turn)
            yield turn
        finally:
            turn.over = True
            self._pass_on()

    def _wait(self, turn: Turn) -> None:
        waited = 0.0
        while not turn.gate.acquire(timeout=LOOK_SECONDS):
            first = self._first()
            if first is not None and not _is_alive(first.thread):
                first.over = True
            # A pool goes on with a stream in another of its threads, and gives this one another stream meanwhile.
            own = first is not None and first is not turn and first.thread is turn.thread
            waited = waited + LOOK_SECONDS if own else 0.0
            if own and (waited >= PATIENCE_SECONDS or threading.active_count() == 1):
                raise InputError(
                    "this thread was the last to advance a stream of this model that is not at its end, so that it "
                    "would wait for itself: finish that stream or close it (stream.close()) first, or load the bundle "
                    "once more"
                )
            self._pass_on()

    def _pass_on(self) -> None:
        """Forgets those before the first who wants a turn, and opens its gate."""
        while self._queue:
            with contextlib.suppress(IndexError, ValueError):  # another thread forgot it
                place = self._queue[0]
                turn = place()
                if turn is None or turn.over:
                    self._queue.remove(place)
                    continue
                with contextlib.suppress(RuntimeError):  # it is open
                    turn.gate.release()
                return

    def _first(self) -> Turn | None:
        with contextlib.suppress(IndexError):
            return self._queue[0]()
        return None

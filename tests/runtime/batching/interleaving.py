"""Runs a few threads one at a time, and chooses at each lock which of them goes on: the same choices, the same run.

A module under test is given `Interleaving.threading` in the place of the module `threading`. Its locks then hand the
turn on: a thread goes on until it takes, gives up or looks at one. `every_interleaving` tries all choices with at most
so many changes of a thread that could have gone on, after Musuvathi and Qadeer, "Iterative Context Bounding" (2007).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace, TracebackType


class DeadlockError(AssertionError):
    """Threads wait for each other for ever."""


@dataclass
class _Thread:
    """One of the threads, with what lets it go on."""

    work: Callable[[], object]
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    waits_for: Lock | None = None
    gives_up: bool = False  # whether it waits for a limited time only
    timed_out: bool = False
    over: bool = False
    error: BaseException | None = None

    @property
    def can_run(self) -> bool:
        return not self.over and (self.waits_for is None or not self.waits_for.taken)


class Interleaving:
    """One run of some threads.

    Attributes:
        points: Of each choice: how many threads could go on, and whether the one before was among them, as the first.
        timeouts: How many waits ended by their time, since nothing else could go on.
    """

    def __init__(self, choose: Callable[[int], int]) -> None:
        """`choose` gives the place of the thread that goes on, of so many."""
        self._choose = choose
        self._threads: list[_Thread] = []
        self._running: _Thread | None = None
        self._ended = threading.Semaphore(0)
        self._deadlock = False
        self.points: list[tuple[int, bool]] = []
        self.timeouts = 0
        self.threading = SimpleNamespace(
            Lock=lambda: Lock(self), current_thread=threading.current_thread, Thread=threading.Thread
        )

    def run(self, *works: Callable[[], object]) -> None:
        """Runs each in a thread until all have ended. Raises the first one's error, or DeadlockError."""
        self._threads = [_Thread(work) for work in works]
        real = [threading.Thread(target=self._body, args=[thread], daemon=True) for thread in self._threads]
        for thread in real:
            thread.start()
        self._hand_on()
        self._ended.acquire()
        if not self._deadlock:
            for thread in real:
                thread.join()
        self._running = None
        if self._deadlock:
            raise DeadlockError(f"threads wait for each other after {len(self.points)} choices")
        for each in self._threads:
            if each.error is not None:
                raise each.error

    def _body(self, thread: _Thread) -> None:
        thread.turn.acquire()
        try:
            thread.work()
        except BaseException as error:
            thread.error = error
        thread.over = True
        self._hand_on()

    def _hand_on(self) -> None:
        """Lets the next thread go on. The one before waits for its turn, if it is another and not over."""
        before = self._running
        able = [thread for thread in self._threads if thread.can_run]
        if before in able:
            able.remove(before)
            able.insert(0, before)
        if not able:
            able = [thread for thread in self._threads if thread.gives_up and not thread.over]
            for thread in able[:1]:
                self.timeouts += 1
                thread.timed_out, thread.waits_for = True, None
            able = able[:1]
        if not able:
            self._deadlock = not all(thread.over for thread in self._threads)
            self._ended.release()
            if self._deadlock:
                threading.Semaphore(0).acquire()  # it goes no further
            return
        place = 0
        if len(able) > 1:
            self.points.append((len(able), able[0] is before))
            place = self._choose(len(able))
        self._running = able[place]
        if able[place] is not before:
            able[place].turn.release()
            if before is not None and not before.over:
                before.turn.acquire()

    def switch(self, waits_for: Lock | None = None, *, gives_up: bool = False) -> bool:
        """A place where another may go on. Returns whether the wait for a lock ended by its time."""
        mine = self._running
        if mine is None:  # before and after the threads
            assert waits_for is None or not waits_for.taken, "the lock is taken, and no thread would give it up"
            return False
        mine.waits_for, mine.gives_up, mine.timed_out = waits_for, gives_up, False
        self._hand_on()
        mine.waits_for, mine.gives_up = None, False
        return mine.timed_out


class Lock:
    """As threading.Lock, for the threads of an interleaving."""

    def __init__(self, interleaving: Interleaving) -> None:
        self._interleaving = interleaving
        self.taken = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Takes it, when it is free."""
        self._interleaving.switch()
        if self.taken and (not blocking or timeout == 0):
            return False
        while self.taken:
            if self._interleaving.switch(self, gives_up=timeout > 0):
                return False
        self.taken = True
        return True

    def release(self) -> None:
        """Gives it up."""
        if not self.taken:
            raise RuntimeError("release unlocked lock")
        self.taken = False
        self._interleaving.switch()

    def locked(self) -> bool:
        """Whether somebody has it."""
        self._interleaving.switch()
        return self.taken

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def at_random(seed: int, share: float = 0.3) -> Callable[[int], int]:
    """A choice that mostly goes on, and changes the thread at this share of the places."""
    rng = random.Random(seed)
    return lambda count: rng.randrange(count) if rng.random() < share else 0


def every_interleaving(changes: int, run: Callable[[Callable[[int], int]], Interleaving]) -> Iterator[Interleaving]:
    """Runs the same threads again and again, each time by other choices, until all with so many changes were made.

    Args:
        changes: How often a thread that could go on is made to wait, at most.
        run: Runs new threads by a choice.
    """
    prefixes: list[list[int]] = [[]]
    while prefixes:
        prefix = prefixes.pop()
        taken = run(_following(prefix))
        yield taken
        used = sum(_is_change(point, place) for point, place in zip(taken.points, prefix, strict=False))
        for number in range(len(prefix), len(taken.points)):
            count, _ = point = taken.points[number]
            zeros = [0] * (number - len(prefix))
            places = (place for place in range(1, count) if used + _is_change(point, place) <= changes)
            prefixes += [[*prefix, *zeros, place] for place in places]


def _following(prefix: Sequence[int]) -> Callable[[int], int]:
    left = iter(prefix)
    return lambda count: min(next(left, 0), count - 1)


def _is_change(point: tuple[int, bool], place: int) -> bool:
    """Whether the choice of a place lets a thread wait that could go on."""
    return point[1] and place > 0

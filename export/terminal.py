"""Shows the stages of an export on standard error: a line each with its seconds, and the current one with a spinner.

The share and the time left are those of the whole export, if its phases are planned, and never fall back.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType

from .progress import Progress

_REDRAWN = 0.2  # seconds between two updates of the current line on a terminal
_HEARTBEAT = 10.0  # seconds between two lines about one stage without a terminal
_FORESEEN = 60.0  # seconds before the time left is estimated
_SPINNER = "|/-\\"


class StageLines(Progress):
    """Redraws the current line with a spinner on a terminal. Elsewhere prints one line when a stage ends.

    A thread draws, since a stage may be one long call of torch that reports nothing.
    """

    def __init__(self) -> None:
        self._out = sys.stderr  # captured now: `quiet` replaces sys.stderr
        self._live = self._out.isatty()
        self._lock = threading.Lock()
        self._stage, self._named = "", Counter[str]()
        self._opened = self._began = self._told = time.monotonic()
        self._phases: Mapping[str, float] = {}
        self._before = self._weight = 0.0  # the planned shares of the phases before the current one, and of this one
        self._skipped = 0.0  # those of phases before it that never began, as with a cached step
        self._share: float | None = None  # completed, of the whole
        self._advanced = self._began  # when it was told
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="pastkey-stages", daemon=True)

    def __enter__(self) -> StageLines:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        with self._lock:
            if kind is None:
                self._end()
            elif self._stage:
                self._print("\n" if self._live else "")

    def plan(self, phases: Mapping[str, float]) -> None:
        with self._lock:
            self._phases, self._share = phases, self._share or 0.0
            self._find_phase()

    def stage(self, name: str) -> None:
        with self._lock:
            self._end()
            self._named[name] += 1
            self._stage = name if self._named[name] == 1 else f"{name} ({self._named[name]})"
            self._began = self._told = time.monotonic()
            if self._phases:
                self._find_phase()
                self._reach(0.0)
            else:
                self._share, self._opened = None, self._began
            self._redraw()

    def advance(self, done: int, total: int) -> None:
        with self._lock:
            if total:
                self._reach(done / total)

    def _find_phase(self) -> None:
        """Keeps the current phase for a stage that has none."""
        names, whole = list(self._phases), sum(self._phases.values())
        if (found := next((name for name in names if self._stage.startswith(name)), None)) is not None:
            before = sum(self._phases[name] for name in names[: names.index(found)]) / whole
            self._skipped += max(0.0, before - self._before - self._weight)
            self._before, self._weight = before, self._phases[found] / whole

    def _reach(self, share: float) -> None:
        """`share` of the stage is complete."""
        if self._phases:
            share = max(self._share or 0.0, self._before + self._weight * share)
        self._share, self._advanced = share, time.monotonic()

    def say(self, sentence: str) -> None:
        with self._lock:
            self._print(f"{self._start()}{sentence}\n")
            self._redraw()

    def warn(self, sentence: str) -> None:
        self.say(f"warning: {sentence}")

    def _tick(self) -> None:
        turns = 0
        while not self._ended.wait(_REDRAWN):
            turns += 1
            with self._lock:
                if self._live:
                    self._redraw(_SPINNER[turns % len(_SPINNER)])
                elif self._stage and time.monotonic() - self._told >= _HEARTBEAT:
                    self._told = time.monotonic()
                    self._print(f"  {self._stage}{self._shown_share()}: {self._shown_time()}\n")

    def _redraw(self, mark: str = _SPINNER[0]) -> None:
        if self._live and self._stage:
            tail = f"{self._shown_share()}  {self._shown_time()}"
            room = shutil.get_terminal_size().columns - len(tail) - 3  # a wrapped line could not be cleared
            self._print(f"{self._start()}{mark} {self._stage[: max(room, 0)]}{tail}")

    def _end(self) -> None:
        if self._stage:
            self._print(f"{self._start()}  {self._stage}  {self._seconds():.1f} s\n")
        self._stage = ""

    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def _shown_share(self) -> str:
        return "" if self._share is None else f" {self._share:.0%}"

    def _shown_time(self) -> str:
        """The time so far, and the time left if the remaining parts are as fast as those that were done."""
        spent = time.monotonic() - self._opened
        done = (self._share or 0.0) - self._skipped
        if done <= 0 or self._share is None or spent < _FORESEEN:
            return _duration(spent)
        took = self._advanced - self._opened
        left = took * (1 - self._share) / done - (spent - took)
        return f"{_duration(spent)}, about {_duration(left)} left" if left >= 1 else _duration(spent)

    def _start(self) -> str:
        """Clears the line that is being redrawn."""
        return "\r\x1b[K" if self._live else ""

    def _print(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def _duration(seconds: float) -> str:
    """Formats a time: 59 s, 1:00 min, 1:00:00 h."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minute:02}:{second:02} h"
    return f"{minutes}:{second:02} min" if minutes else f"{second} s"

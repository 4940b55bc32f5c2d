"""Where a streamed text ends: stop strings never show, nor any part of one."""

from __future__ import annotations

import bisect
from collections.abc import Collection


class StopStrings:
    """Cuts a stream of text before the first of some strings, holding back what may be the beginning of one.

    The strings stand in order, without those that begin with another one, which can tell nothing more. Then all that
    begin with a text t are beside one another, from where t would stand on, and the one that t begins with, if there is
    one, is the last before that place: two looks in the order, however many strings there are.
    """

    def __init__(self, stops: Collection[str]) -> None:
        self._stops: list[str] = []
        for stop in sorted(stops):
            if not (self._stops and stop.startswith(self._stops[-1])):
                self._stops.append(stop)
        self._held = ""
        self._starts: list[int] = []  # places of the held text where a stop string may have begun
        self.found: str | None = None  # the stop string that ended the text

    def push(self, text: str) -> str:
        """Takes more text; returns the part that no stop string can reach. Once one is `found`, nothing comes."""
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        new = range(len(self._held), len(self._held) + len(text))
        self._held += text
        starts = []
        for start in (*self._starts, *new):
            rest = self._held[start:]
            place = bisect.bisect_right(self._stops, rest)
            if place and rest.startswith(self._stops[place - 1]):
                self.found = self._stops[place - 1]
                starts = [start]
                break
            if place < len(self._stops) and self._stops[place].startswith(rest):
                starts.append(start)
        cut = starts[0] if starts else len(self._held)
        out, self._held = self._held[:cut], self._held[cut:]
        self._starts = [start - cut for start in starts]
        return out

    def flush(self) -> str:
        """The text held back, when no more follows."""
        return self._held if self.found is None else ""

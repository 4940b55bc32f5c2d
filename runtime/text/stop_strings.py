"""Stop strings: end a streamed text before a stop string, without showing any part of it."""

from __future__ import annotations

import bisect
from collections.abc import Collection


class StopStrings:
    """Cuts streamed text before the first stop string; holds back text that may be the beginning of one.

    The strings are sorted, without those that begin with another one. So all strings that begin with a text t are
    adjacent, from t's sorted position on, and the one string that t begins with, if any, is the last before that
    position. Two lookups suffice for any number of strings.
    """

    def __init__(self, stops: Collection[str]) -> None:
        self._stops: list[str] = []
        for stop in sorted(stops):
            if not (self._stops and stop.startswith(self._stops[-1])):
                self._stops.append(stop)
        self._held = ""
        self._starts: list[int] = []  # positions in the held text where a stop string may begin
        self.found: str | None = None  # the stop string that ended the text

    def push(self, text: str) -> str:
        """Adds text; returns the part that no stop string can include, and "" once one is `found`."""
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
        """Returns the text that was held back. No more text may follow."""
        return self._held if self.found is None else ""

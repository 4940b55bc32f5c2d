"""How a long export reports stages, progress and warnings. This class reports nothing."""

from __future__ import annotations


class Progress:
    """A listener. Override the methods to show something."""

    def stage(self, name: str) -> None:
        """The next stage begins."""

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` parts of the current stage are complete."""

    def say(self, sentence: str) -> None:
        """Tells the user."""

    def warn(self, sentence: str) -> None:
        """Warns the user. The export continues."""


SILENT = Progress()


class Recorder(Progress):
    """Forwards everything to another listener and records the warnings."""

    def __init__(self, listener: Progress) -> None:
        self._listener = listener
        self.warnings: list[str] = []

    def stage(self, name: str) -> None:
        self._listener.stage(name)

    def advance(self, done: int, total: int) -> None:
        self._listener.advance(done, total)

    def say(self, sentence: str) -> None:
        self._listener.say(sentence)

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)
        self._listener.warn(sentence)

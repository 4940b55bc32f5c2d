"""How a long export tells what it does: stages, how far a stage is, and warnings. This one tells nobody."""

from __future__ import annotations


class Progress:
    """A listener: override what shall be shown."""

    def stage(self, name: str) -> None:
        """The next stage begins."""

    def advance(self, done: int, total: int) -> None:
        """So many of the current stage's parts are done."""

    def warn(self, sentence: str) -> None:
        """Something that the user should know, and that does not stop the export."""


SILENT = Progress()


class Recorder(Progress):
    """Passes everything on to another listener and keeps the warnings."""

    def __init__(self, listener: Progress) -> None:
        self._listener = listener
        self.warnings: list[str] = []

    def stage(self, name: str) -> None:
        self._listener.stage(name)

    def advance(self, done: int, total: int) -> None:
        self._listener.advance(done, total)

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)
        self._listener.warn(sentence)

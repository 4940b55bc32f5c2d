"""A listener of an export that keeps the names of the stages."""

from __future__ import annotations

from pastkey.export.progress import Progress


class StageNames(Progress):
    def __init__(self, names: list[str]) -> None:
        self._names = names

    def stage(self, name: str) -> None:
        self._names.append(name)

"""Whether rows are decoded together or in turn with drafts: by the seconds that each took here, and what drafts bring.

A run of several rows has no drafts. Where texts repeat themselves, a few rows are faster one after another: at two rows
of SmolLM2 in int8 a common run gives 1.8 times the tokens of one row, and a step with accepted drafts 2 and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_WEIGHT = 0.2  # of the newest figure in an average
_MARGIN = 1.1  # by which turns must be faster: changing over moves rows
_DRAFT_COST = 1.3  # a run with drafts against one of a token, until it was timed


class Row(Protocol):
    """A generation, as far as its pace goes."""

    tokens_per_step: float


class Pace:
    """Averages of the seconds of a run, by the number of its rows, and of one row with a draft."""

    def __init__(self) -> None:
        self._rows: dict[int, float] = {}
        self._draft: float | None = None

    def note(self, rows: int, seconds: float, *, draft: bool = False) -> None:
        """Takes in how long a run took that decoded."""
        if draft:
            self._draft = _averaged(self._draft, seconds)
        else:
            self._rows[rows] = _averaged(self._rows.get(rows), seconds)

    def turns_pay(self, rows: Sequence[Row]) -> bool:
        """Whether these rows give more tokens a second one after another, with drafts."""
        together, alone = self._rows.get(len(rows)), self._rows.get(1)
        draft = self._draft if self._draft is not None or alone is None else _DRAFT_COST * alone
        if together is None or draft is None or all(row.tokens_per_step <= 1 for row in rows):
            return False  # without drafts a common run is the faster one, whatever a busy machine has measured
        in_turn = sum(row.tokens_per_step for row in rows) / (len(rows) * draft)  # tokens a second
        return in_turn > _MARGIN * len(rows) / together


def _averaged(before: float | None, newest: float) -> float:
    return newest if before is None else before + _WEIGHT * (newest - before)

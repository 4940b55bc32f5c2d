"""Decide between one batch and single steps with drafts, by measured seconds and accepted draft tokens.

A batched run has no drafts. If sequences repeat themselves, a few of them are faster one after another: with two
sequences of SmolLM2 in int8, a batch decodes 1.8 times the tokens of one, a step with accepted drafts 2 and more.
"""

from __future__ import annotations

from collections.abc import Sequence

_WEIGHT = 0.2  # of the newest figure in a moving average
_MARGIN = 1.1  # factor by which single steps must be faster, since a change moves caches
_DRAFT_COST = 1.3  # assumed time of a run with drafts, relative to one token, until it was measured


class Pace:
    """Moving averages of the seconds of a run, by batch size, and of a single sequence with a draft."""

    def __init__(self) -> None:
        self._rows: dict[int, float] = {}
        self._draft: float | None = None

    def note(self, rows: int, seconds: float, *, draft: bool = False) -> None:
        """Records the seconds of a decoding run."""
        if draft:
            self._draft = _averaged(self._draft, seconds)
        else:
            self._rows[rows] = _averaged(self._rows.get(rows), seconds)

    def turns_pay(self, tokens_per_step: Sequence[float]) -> bool:
        """Whether single steps with drafts decode more tokens per second than a batch of rows that accept so many."""
        together, alone = self._rows.get(len(tokens_per_step)), self._rows.get(1)
        draft = self._draft if self._draft is not None or alone is None else _DRAFT_COST * alone
        if together is None or draft is None or max(tokens_per_step) <= 1:
            return False  # without drafts the batch is faster, whatever was measured on a busy machine
        count = len(tokens_per_step)
        in_turn = sum(tokens_per_step) / (count * draft)  # tokens per second
        return in_turn > _MARGIN * count / together


def _averaged(before: float | None, newest: float) -> float:
    return newest if before is None else before + _WEIGHT * (newest - before)

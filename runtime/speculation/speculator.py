"""Draft tokens for one text: what it said before itself, and where it says nothing, what a draft model says."""

from __future__ import annotations

from collections.abc import Sequence

from ..settings import MAX_DRAFT_TOKENS
from .drafter import Allows, Drafter
from .prompt_lookup import PromptLookup


class Speculator:
    """Of one text.

    A step that the text is alone in is `start` and then `read`, or `draft`, a run and `end`; one with other rows is
    `guess`, a run and `came`.
    """

    def __init__(self, *, prompt_lookup: bool, drafter: Drafter | None, constraint: Allows | None) -> None:
        """Without either it drafts nothing. `constraint`: what new tokens are held to."""
        self._prompt_lookup = PromptLookup() if prompt_lookup else None
        self._drafter, self._constraint = drafter, constraint
        self._guess: list[int] | None = None  # the draft that would have been run, where rows are decoded together
        self._drafted = self._guessed = 0

    def start(self) -> None:
        """A step begins."""
        if self._drafter is not None:
            self._drafter.start()

    def read(self) -> None:
        """Takes in that the step read a part of the prompt."""
        if self._drafter is not None:
            self._drafter.read()

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens to run behind `ids`, the text so far."""
        found = self._looked_up(ids, most)
        return found if self._drafter is None else self._drafter.draft(ids, found, most)

    def end(self, drafted: int, accepted: int) -> None:
        """Takes in how many tokens were drafted, and accepted, when the step has ended."""
        drafter = self._drafter
        if drafter is not None:
            drafter.end(drafted, accepted)
        if drafted and self._prompt_lookup is not None and (drafter is None or not drafter.made):
            self._prompt_lookup.record(drafted, accepted)

    def guess(self, ids: Sequence[int], most: int) -> None:
        """Takes note of what would be drafted. A draft model is not asked: that would cost a run of its own."""
        if self._guess is None:
            self._guess, self._guessed = self._looked_up(ids, most), 0
            self._drafted = len(self._guess)

    def came(self, token: int | None, *, more: bool) -> int:
        """Takes in which token came, and whether others that had to follow. None: the text has ended.

        Returns how many tokens a step of this row alone would have brought, or 0 while that goes on.
        """
        if self._guess and self._guess.pop(0) == token:
            self._guessed += 1
            if not more:
                return 0
        if self._drafted and self._prompt_lookup is not None:
            self._prompt_lookup.record(self._drafted, self._guessed)
        self._guess = None
        return self._guessed + 1

    def stop(self) -> None:
        """Drafts no more, and lets go of the draft model's cache."""
        self._prompt_lookup = None
        if self._drafter is not None:
            self._drafter.stop()

    def _looked_up(self, ids: Sequence[int], most: int) -> list[int]:
        if self._prompt_lookup is None:
            return []
        draft = self._prompt_lookup.draft(ids, min(MAX_DRAFT_TOKENS, most))
        return draft if self._constraint is None else self._constraint.allowed_draft(draft)

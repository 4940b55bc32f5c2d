"""Draft tokens for one request: by prompt lookup, and if that finds none, by a draft model."""

from __future__ import annotations

from collections.abc import Sequence

from ..constraints.matcher import Matcher
from ..settings import MAX_DRAFT_TOKENS
from .drafter import Drafter
from .prompt_lookup import PromptLookup


class Speculator:
    """The drafts of one request.

    A step outside a batch calls `draft`, a run and `end`. A batched step calls `guess`, a run and `came`.
    """

    def __init__(self, *, prompt_lookup: bool, drafter: Drafter | None, constraint: Matcher | None) -> None:
        """Without `prompt_lookup` and `drafter` all drafts are empty. `constraint` restricts draft tokens."""
        self._prompt_lookup = PromptLookup() if prompt_lookup else None
        self._drafter, self._constraint = drafter, constraint
        self._asked: Drafter | None = None  # the drafter, if it was asked for the newest draft
        self._guess: list[int] | None = None  # in batched steps, the draft that a single step would have run
        self._drafted = self._guessed = 0

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` draft tokens to run behind `ids`."""
        found = self._looked_up(ids, most)
        self._asked = self._drafter if not found else None
        return found if self._asked is None else self._asked.draft(ids, most)

    def end(self, drafted: int, accepted: int) -> None:
        """Records the numbers of drafted and accepted tokens at the end of a step."""
        if self._asked is not None and self._asked.made:
            self._asked.record(drafted, accepted)
        elif drafted and self._prompt_lookup is not None:
            self._prompt_lookup.record(drafted, accepted)

    def guess(self, ids: Sequence[int], most: int) -> None:
        """Records the draft that prompt lookup would make. Skips the draft model, which would cost a run."""
        if self._guess is None:
            self._guess, self._guessed = self._looked_up(ids, most), 0
            self._drafted = len(self._guess)

    def came(self, token: int | None, *, more: bool) -> int:
        """Compares the guess with the sampled `token`; None at the end. `more`: whether forced tokens followed.

        Returns how many tokens a single step would have decoded, or 0 while the guess still holds.
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
        """Ends drafting and releases the draft model's cache."""
        self._prompt_lookup = None
        if self._drafter is not None:
            self._drafter.stop()

    def _looked_up(self, ids: Sequence[int], most: int) -> list[int]:
        if self._prompt_lookup is None:
            return []
        draft = self._prompt_lookup.draft(ids, min(MAX_DRAFT_TOKENS, most))
        return draft if self._constraint is None else self._constraint.allowed_draft(draft)

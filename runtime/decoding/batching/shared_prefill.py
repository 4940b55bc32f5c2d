"""One prefill for prompts that begin alike: the first computes it, the others copy its cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...engine.engine import Engine
from ..generation import Generation

SHARED_TOKENS = 32  # that prompts begin with, for what they share to be computed once


class SharedPrefills:
    """The prompts of one call, by their beginnings."""

    def __init__(self) -> None:
        self._of: dict[tuple[int, ...], SharedPrefill] = {}

    def join(self, ids: Sequence[int]) -> SharedPrefill:
        """The one of the prompts that begin as `ids` (T,), of which this is one more."""
        found = self._of.setdefault(tuple(ids[:SHARED_TOKENS]), SharedPrefill())
        found.left += 1
        return found


class SharedPrefill:
    """The cache of the first prompt that begins.

    All of it happens in the leader's steps, between two runs. Where a cache cannot be copied (on another device), the
    first has ended already and its engine does something else, or a window has left the prompt behind, each computes
    its own.

    Attributes:
        left: How many have not begun.
    """

    def __init__(self) -> None:
        self.left = 0
        self._first: Generation | None = None
        self._kept: Engine | None = None  # with the first prompt alone

    def take(self, generation: Generation, move_out: Callable[[Engine], object]) -> tuple[Engine, int] | None:
        """An engine for a continuation, and how many of the prompt's tokens are in its cache; None for one of its own.

        `move_out`: takes an engine out of the memory that it shares with others.
        """
        self.left -= 1
        if self._first is None:
            self._first = generation
            return None
        ids = generation.kept_ids
        if self._kept is None:
            self._kept = self._copied(self._first, move_out)
        kept = self._kept
        shared = 0 if kept is None else kept.shared_with(ids)
        if kept is None or not shared or not kept.can_trim(shared):
            return None
        if not self.left:
            self._kept = None
            kept.trim(shared)
            return kept, shared
        return kept.copy(shared, room=len(ids) - shared + 1), shared

    @staticmethod
    def _copied(first: Generation, move_out: Callable[[Engine], object]) -> Engine | None:
        engine, ids = first.engine, first.ids[: first.prompt_tokens]
        length = min(engine.shared_with(ids), engine.exact_length)
        if not length or not engine.graph.copies or not engine.can_trim(length):
            return None
        move_out(engine)
        return engine.copy(length, room=len(ids) - length + 1)

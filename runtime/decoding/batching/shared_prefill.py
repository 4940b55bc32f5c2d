"""One prefill for several continuations of one prompt: the first computes it, the others copy its cache."""

from __future__ import annotations

from collections.abc import Callable

from ...engine.engine import Engine
from ..generation import Generation


class SharedPrefill:
    """The cache of one prompt, from the first of its continuations that begins.

    All of it happens in the leader's steps, between two runs. Where a cache cannot be copied (on another device), the
    first has ended already and its engine does something else, or a window has left the prompt behind, each computes
    its own.
    """

    def __init__(self, count: int) -> None:
        """`count`: how many continuations there are."""
        self.count = self._left = count
        self._first: Generation | None = None
        self._kept: Engine | None = None  # with the prompt alone

    def take(self, generation: Generation, move_out: Callable[[Engine], object]) -> tuple[Engine, int] | None:
        """An engine for a continuation, and how many of the prompt's tokens are in its cache; None for one of its own.

        `move_out`: takes an engine out of the memory that it shares with others.
        """
        self._left -= 1
        if self._first is None:
            self._first = generation
            return None
        ids = generation.kept_ids
        if self._kept is None:
            self._kept = self._copied(self._first.engine, ids, move_out)
        kept = self._kept
        if kept is None:
            return None
        if not self._left:
            self._kept = None
            return kept, kept.length
        return kept.copy(room=len(ids) - kept.length + 1), kept.length

    @staticmethod
    def _copied(engine: Engine, ids: list[int], move_out: Callable[[Engine], object]) -> Engine | None:
        shared = min(engine.shared_with(ids), engine.exact_length)
        if not shared or not engine.graph.copies or not engine.can_trim(shared):
            return None
        move_out(engine)
        return engine.copy(shared, room=len(ids) - shared + 1)

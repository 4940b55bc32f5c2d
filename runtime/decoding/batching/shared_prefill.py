"""Share one prefill among prompts with the same beginning: the first computes it, the others copy its KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...engine.engine import Engine
from ..generation import Generation

SHARED_TOKENS = 32  # prompts that agree in so many first tokens share a prefill


class SharedPrefills:
    """The prompts of one call, grouped by their beginnings."""

    def __init__(self) -> None:
        self._of: dict[tuple[int, ...], SharedPrefill] = {}

    @property
    def begun(self) -> bool:
        """Whether a prompt has joined."""
        return bool(self._of)

    def join(self, ids: Sequence[int]) -> SharedPrefill:
        """Adds the prompt `ids` (T,) to the group with its beginning and returns the group."""
        found = self._of.setdefault(tuple(ids[:SHARED_TOKENS]), SharedPrefill())
        found.left += 1
        return found


class SharedPrefill:
    """A group of prompts that copy the KV cache of the first one that begins.

    It is used only by the scheduler's leader, between two runs. Each prompt runs its own prefill if the cache cannot be
    copied: on another device, if the first prompt has ended and its engine is in other use, or if a sliding window has
    left the prompt behind.

    Attributes:
        left: Number of prompts that have not begun.
    """

    def __init__(self) -> None:
        self.left = 0
        self._first: Generation | None = None
        self._kept: Engine | None = None  # a copy that holds only the first prompt

    def take(self, generation: Generation, move_out: Callable[[Engine], object]) -> tuple[Engine, int] | None:
        """Returns an engine and the number of prompt tokens in its cache; None if the prompt needs its own prefill.

        `move_out`: moves an engine out of the slab.
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

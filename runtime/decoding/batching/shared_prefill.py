"""Share one prefill among prompts with the same beginning: the first computes it, the others copy its KV cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence

from pastkey.errors import ResourceError

from ...engine.decoder_graph import DecoderGraph
from ...engine.engine import Engine
from ..generation import Generation
from .cache_budget import CacheMemory

SHARED_TOKENS = 32  # prompts that agree in so many first tokens share a prefill


class SharedPrefills:
    """The prompts of one call, grouped by their beginnings.

    Attributes:
        begun: Whether a prompt has joined.
    """

    def __init__(self, prompts: Iterable[Sequence[int]], completions: int = 1) -> None:
        """`prompts`: the ids (T,) of each, of which every one has so many `completions`."""
        self._of: dict[tuple[int, ...], SharedPrefill] = {}
        for ids in prompts:
            self.join(ids).left += completions
        self.begun = False

    def join(self, ids: Sequence[int]) -> SharedPrefill:
        """Returns the group with the beginning of `ids` (T,)."""
        self.begun = True
        group = self._of.setdefault(tuple(ids[:SHARED_TOKENS]), SharedPrefill(ids))
        group.agree(ids)
        return group

    def clear(self) -> None:
        """Leaves the groups to the prompts that have joined, and each cache to the last of them."""
        self._of = {}


class SharedPrefill:
    """A group of prompts that copy the KV cache of the first one that begins.

    It is used only by the scheduler's leader, between two runs. Each prompt runs its own prefill if the cache cannot be
    copied: on another device, if there is no memory for the copy, or if a sliding window has left the prompt behind.

    Attributes:
        left: Number of prompts that have not begun.
        common: Number of first tokens that all prompts share.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        """`ids`: the first prompt, (T,)."""
        self.left = 0
        self._ids, self.common = ids, len(ids)
        self._first: Generation | None = None  # it runs
        self._kept: Engine | None = None  # holds only a prompt; the memory is reserved for this group

    def agree(self, ids: Sequence[int]) -> None:
        """Adds the beginning of one more prompt."""
        pairs = zip(self._ids[: self.common], ids, strict=False)
        self.common = next(
            (place for place, (one, other) in enumerate(pairs) if one != other), min(self.common, len(ids))
        )

    def take(
        self, generation: Generation, move_out: Callable[[Engine], object], memory: CacheMemory
    ) -> tuple[Engine, int] | None:
        """Returns an engine and the number of prompt tokens in its cache; None if the prompt needs its own prefill.

        `move_out`: moves an engine out of the slab.
        """
        self.left -= 1
        if self._kept is None:
            if self._first is None:
                self._first = generation
                return None
            self._kept = self._copied(self._first, move_out, memory)
        kept, ids = self._kept, generation.kept_ids
        shared = 0 if kept is None else kept.shared_with(ids)
        if kept is None or not shared:
            if not self.left:
                self._drop(memory)
            return None
        copies = self.left and kept.graph.copies
        if copies and _reserved(memory, generation, kept.graph, generation.most_tokens):
            return kept.copy(shared, room=len(ids) - shared + 1), shared
        self._drop(memory)
        self._first = generation
        kept.trim(shared)
        return kept, shared

    def leave(self, memory: CacheMemory) -> None:
        """Counts a prompt that ended before it began."""
        self.left -= 1
        if not self.left:
            self._drop(memory)

    def inherits(self, generation: Generation) -> bool:
        """Whether the group gets the cache of a generation that has ended: others wait for a copy of it."""
        first, self._first = self._first, None if self._first is generation else self._first
        return first is generation and self._kept is None and self.left > 0 and _prompt_length(generation) > 0

    def inherit(self, generation: Generation, memory: CacheMemory) -> None:
        """Keeps the cache, cut to the prompt."""
        if _reserved(memory, self, generation.engine.graph, generation.most_tokens):
            self._kept = generation.engine
            self._kept.trim(_prompt_length(generation))

    def _copied(self, first: Generation, move_out: Callable[[Engine], object], memory: CacheMemory) -> Engine | None:
        engine, length, tokens = first.engine, _prompt_length(first), first.prompt_tokens + 1
        if not length or not engine.graph.copies or not _reserved(memory, self, engine.graph, tokens):
            return None
        move_out(engine)
        return engine.copy(length, room=tokens - length)

    def _drop(self, memory: CacheMemory) -> None:
        self._kept = None
        memory.release(self)


def _prompt_length(generation: Generation) -> int:
    """Number of prompt tokens that the cache can be cut to, 0 if it cannot."""
    engine = generation.engine
    return engine.shared_with(generation.ids[: generation.prompt_tokens], exact=True)


def _reserved(memory: CacheMemory, holder: object, graph: DecoderGraph, tokens: int) -> bool:
    """Reserves memory for a copy if there is room."""
    with contextlib.suppress(ResourceError):
        memory.reserve(holder, graph, tokens)
        return True
    return False

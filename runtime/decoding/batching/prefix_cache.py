"""Prefixes: the caches of earlier texts, of which a new prompt takes the one that begins as it does.

The last text is kept always, for its memory if for nothing else; those of calls that reuse prefixes are kept up to a
limit, and the one that was used least recently goes first.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...engine.decoder_graph import DecoderGraph
from ...engine.engine import Engine

PREFIX_BYTES = 256 * 2**20  # as far as nothing else is asked for
TAIL = 8  # tokens of an entry that may be lost where it is taken instead of copied


class PrefixStore:
    """Engines that nobody runs, the least recently used first. Not for several threads at once."""

    def __init__(self, graph: DecoderGraph, most_bytes: int = PREFIX_BYTES) -> None:
        self._graph = graph
        self.most_bytes = most_bytes
        self._entries: list[Engine] = []
        self._spare: Engine | None = None  # the last text of a call that does not reuse prefixes

    @property
    def nbytes(self) -> int:
        """Bytes that the caches take."""
        return sum(engine.nbytes for engine in self._all())

    def __len__(self) -> int:
        return len(self._all())

    def take(self, ids: Sequence[int], *, reuse: bool = True, exact: bool = False) -> tuple[Engine, int]:
        """An engine for the prompt `ids` (T,), and how many of its first tokens are in the cache.

        Args:
            ids: The prompt.
            reuse: Whether any may be; without it the engine is empty.
            exact: Whether only those that a prefill computed.
        """
        nearest, shared = self.nearest(ids, exact=exact) if reuse else (None, 0)
        if nearest is None:
            spare, self._spare = self._spare, None
            if spare is None:
                return Engine.over(self._graph), 0
            spare.reset()
            return spare, 0
        if nearest.length - shared <= TAIL or not self._graph.copies:
            self._drop(nearest)
            return nearest, nearest.keep_prefix(ids, exact=exact)
        if nearest is not self._spare:
            self._entries.remove(nearest)
            self._entries.append(nearest)
        engine = nearest.copy(shared, room=len(ids) - shared)
        return engine, shared

    def nearest(self, ids: Sequence[int], *, exact: bool = False) -> tuple[Engine | None, int]:
        """The engine that shares most with `ids` (T,), and how many tokens; None and 0 where none shares any."""
        nearest, shared = None, 0
        for engine in self._all():
            found = engine.shared_with(ids)
            found = min(found, engine.exact_length) if exact else found
            if not engine.can_trim(found):
                found = 0
            if found > shared:
                nearest, shared = engine, found
        return nearest, shared

    def put(self, engine: Engine, *, reuse: bool = True) -> None:
        """Keeps an engine that nobody uses any more, in the place of all that hold no more than its beginning."""
        if not engine.length or engine.nbytes > self.most_bytes:
            return
        if not reuse or not engine.cached_ids:  # after a shift it begins no text
            self._spare = engine
        else:
            ids = engine.cached_ids
            for other in self._all():
                if (
                    len(ids) >= other.length
                    and engine.can_trim(other.length)
                    and ids[: other.length] == other.cached_ids
                ):
                    self._drop(other)
            self._entries.append(engine)
        self.shrink(self.most_bytes)

    def shrink(self, most_bytes: int) -> None:
        """Lets go of the least recently used until the rest takes no more than so many bytes."""
        while self._all() and self.nbytes > most_bytes:
            self._drop(self._all()[0])

    def clear(self) -> None:
        """Lets go of all."""
        self._entries, self._spare = [], None

    def _all(self) -> list[Engine]:
        return [*self._entries, *([] if self._spare is None else [self._spare])]

    def _drop(self, engine: Engine) -> None:
        if engine is self._spare:
            self._spare = None
        else:
            self._entries.remove(engine)

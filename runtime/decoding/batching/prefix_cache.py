"""Prefix cache: stores the KV caches of ended requests. A new prompt reuses the one with the longest shared prefix.

The cache of the last request is always stored, at least to reuse its memory. Caches of requests that reuse prefixes are
stored up to a limit and evicted least recently used first. A cache serves requests of its own graph, so never those of
another adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...engine.decoder_graph import DecoderGraph
from ...engine.engine import Engine

PREFIX_BYTES = 256 * 2**20  # default limit
TAIL = 8  # an entry that would lose at most so many tokens is moved instead of copied


class PrefixStore:
    """Idle engines, the least recently used first. Not thread-safe."""

    def __init__(self, graph: DecoderGraph, most_bytes: int = PREFIX_BYTES) -> None:
        self._graph = graph
        self.most_bytes = most_bytes
        self._entries: list[Engine] = []
        self._spare: Engine | None = None  # of the last request that does not reuse prefixes

    @property
    def nbytes(self) -> int:
        """Bytes of the stored caches."""
        return sum(engine.nbytes for engine in self._all())

    def __len__(self) -> int:
        return len(self._all())

    def take(
        self, ids: Sequence[int], graph: DecoderGraph | None = None, *, reuse: bool = True, exact: bool = False
    ) -> tuple[Engine, int]:
        """Returns an engine for the prompt `ids` (T,) and the number of its first tokens in the cache.

        Args:
            ids: The prompt.
            graph: Its graph; None for the base model's.
            reuse: Whether to reuse a prefix; False returns an empty engine.
            exact: Whether to reuse only tokens that a prefill computed.
        """
        graph = graph or self._graph
        marks = reuse and (graph.manifest.states or graph.windows)
        branch = max((engine.common(ids) for engine in self._of(graph)), default=0) if marks else 0
        nearest, shared = self.nearest(ids, graph, exact=exact) if reuse else (None, 0)
        if nearest is None:
            engine = self._empty(graph)
        elif nearest.length - shared <= TAIL or not graph.copies:
            self._drop(nearest)
            engine, shared = nearest, nearest.keep_prefix(ids, exact=exact)
        else:
            if nearest is not self._spare:
                self._entries.remove(nearest)
                self._entries.append(nearest)
            engine = nearest.copy(shared, room=len(ids) - shared)
        engine.branch = branch
        return engine, shared

    def _empty(self, graph: DecoderGraph) -> Engine:
        """The spare engine, emptied, or a new one."""
        if self._spare is None or self._spare.graph is not graph:
            return Engine.over(graph)
        spare, self._spare = self._spare, None
        spare.reset()
        return spare

    def nearest(
        self, ids: Sequence[int], graph: DecoderGraph | None = None, *, exact: bool = False
    ) -> tuple[Engine | None, int]:
        """The engine with the longest shared prefix of `ids` (T,) and its length; None and 0 if there is none."""
        nearest, shared = None, 0
        for engine in self._of(graph or self._graph):
            found = engine.shared_with(ids, exact=exact)
            if found > shared:
                nearest, shared = engine, found
        return nearest, shared

    def put(self, engine: Engine, *, reuse: bool = True) -> None:
        """Stores an idle engine. Drops the stored engines that hold only a prefix of it."""
        if not engine.length or engine.nbytes > self.most_bytes or engine.graph.unloaded:
            return
        if not reuse or not engine.cached_ids:  # after a shift the cache is not a prefix of any sequence
            self._spare = engine
        else:
            ids = engine.cached_ids
            for other in self._of(engine.graph):
                if (
                    len(ids) >= other.length
                    and engine.can_trim(other.length)
                    and ids[: other.length] == other.cached_ids
                ):
                    self._drop(other)
            self._entries.append(engine)
        self.shrink(self.most_bytes)

    def shrink(self, most_bytes: int) -> None:
        """Evicts the least recently used caches until the rest has at most `most_bytes`."""
        while self._all() and self.nbytes > most_bytes:
            self._drop(self._all()[0])

    def clear(self, graph: DecoderGraph | None = None) -> None:
        """Evicts all caches, or those of one graph."""
        for engine in self._all() if graph is None else self._of(graph):
            self._drop(engine)

    def _all(self) -> list[Engine]:
        return [*self._entries, *([] if self._spare is None else [self._spare])]

    def _of(self, graph: DecoderGraph) -> list[Engine]:
        return [engine for engine in self._all() if engine.graph is graph]

    def _drop(self, engine: Engine) -> None:
        if engine is self._spare:
            self._spare = None
        else:
            self._entries.remove(engine)

"""A memory limit for KV caches. It is checked before a cache grows, to raise a clear error instead of swapping."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from pastkey.errors import ResourceError
from pastkey.values import is_int, require

from ...engine.decoder_graph import DecoderGraph
from ...engine.engine import Engine
from .prefix_cache import PrefixStore


class CacheMemory:
    """Limits the caches of a model and its draft model: those in use, at their largest size, and stored prefixes."""

    def __init__(self, graph: DecoderGraph, stores: Sequence[PrefixStore], most_bytes: int | None) -> None:
        """`most_bytes`: the limit; None for none. `stores` are evicted in this order."""
        self._graph, self._stores, self._most = graph, stores, most_bytes
        self._promised: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()

    def estimate(self, tokens: int) -> int:
        """The largest size in bytes of a cache of `tokens`, capped by the context or the widest attention window.

        Raises InputError unless `tokens` is a whole number from 0.
        """
        require(is_int(tokens, 0), "tokens", tokens, "a whole number from 0")
        return self._graph.cache_bytes(tokens)

    def promise(self, engine: Engine, tokens: int, rows: int = 1) -> None:
        """As `reserve`, for a cache that is there: in an engine."""
        self.reserve(engine, engine.graph, tokens, rows)

    def reserve(self, holder: object, graph: DecoderGraph, tokens: int, rows: int = 1) -> None:
        """Reserves memory for a cache of `tokens` in each of `rows`. Evicts stored prefixes if needed.

        `holder`: has one reservation, until it is released or collected. Raises ResourceError if there is no room.
        """
        needed = rows * graph.cache_bytes(tokens)
        if self._most is None:
            return
        others = sum(size for other, size in list(self._promised.items()) if other is not holder)
        left = self._most - others - needed
        for place, store in enumerate(self._stores):
            store.shrink(max(0, left - sum(later.nbytes for later in self._stores[place + 1 :])))
            left -= store.nbytes
        if others + needed > self._most:
            raise ResourceError(
                f"the cache of {tokens} tokens needs {needed / 2**20:.1f} MiB and others use {others / 2**20:.1f}; "
                f"max_memory is {self._most / 2**20:.1f}: wait until others have ended, close sessions, ask for fewer "
                "tokens, or load the model with more"
            )
        self._promised[holder] = needed

    def release(self, holder: object) -> None:
        """Releases the reservation for a cache that is stored or unused."""
        self._promised.pop(holder, None)

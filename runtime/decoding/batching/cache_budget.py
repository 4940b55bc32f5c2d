"""How much memory the caches may take: asked before they grow, so that a clear error comes in the place of swapping."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from pastkey.errors import ResourceError
from pastkey.values import is_int, require

from ...engine.decoder_graph import DecoderGraph
from ...engine.engine import Engine
from .prefix_cache import PrefixStore


class CacheMemory:
    """A limit for all caches of a model and its draft: those in use, at the size they may come to, and prefixes too."""

    def __init__(self, graph: DecoderGraph, stores: Sequence[PrefixStore], most_bytes: int | None) -> None:
        """`stores` make room in this order."""
        self._graph, self._stores, self._most = graph, stores, most_bytes
        self._promised: weakref.WeakKeyDictionary[Engine, int] = weakref.WeakKeyDictionary()

    def estimate(self, tokens: int) -> int:
        """Bytes of a cache of so many tokens at its largest: no more than the context has, or all windows see.

        Raises InputError for what is no number of tokens.
        """
        require(is_int(tokens, 0), "tokens", tokens, "a whole number from 0")
        return self._graph.cache_bytes(tokens)

    def promise(self, engine: Engine, tokens: int, rows: int = 1) -> None:
        """Takes note that an engine's cache grows to so many tokens in each of its rows.

        Raises ResourceError where there is no room.
        """
        needed = rows * engine.graph.cache_bytes(tokens)
        if self._most is None:
            return
        others = sum(size for other, size in list(self._promised.items()) if other is not engine)
        left = self._most - others - needed
        for place, store in enumerate(self._stores):
            store.shrink(max(0, left - sum(later.nbytes for later in self._stores[place + 1 :])))
            left -= store.nbytes
        if others + needed > self._most:
            raise ResourceError(
                f"the cache of {tokens} tokens takes {needed / 2**20:.1f} MiB and others take {others / 2**20:.1f}; "
                f"max_memory is {self._most / 2**20:.1f}: wait until others have ended, close sessions, ask for fewer "
                "tokens, or load the model with more"
            )
        self._promised[engine] = needed

    def release(self, engine: Engine) -> None:
        """Forgets an engine that is stored or of no use any more."""
        self._promised.pop(engine, None)

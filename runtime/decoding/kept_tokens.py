"""Which tokens of a sequence longer than the context stay in the KV cache: the first few and the newest."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pastkey.errors import InputError
from pastkey.values import require

from ..engine.engine import Engine
from ..engine.shift import require_shift
from ..options import NUM_SINK_TOKENS, ContextOverflow


class KeptTokens:
    """The tokens of one sequence that are, or will be, in its KV cache.

    With "shift", the first `sinks` tokens stay and the oldest half of the others is evicted at a time, so that the
    cache moves only once in that many tokens.

    Attributes:
        sinks: Number of first tokens that stay.
        block: Number of tokens evicted at a time; 0 if eviction is off.
        dropped: Number of tokens evicted so far, behind the sinks.
    """

    def __init__(self, engine: Engine, overflow: ContextOverflow = "error", sinks: int = NUM_SINK_TOKENS) -> None:
        """Raises InputError if more than half the context stays, or the bundle's cache cannot be shifted."""
        self._engine = engine
        self._context = context = engine.manifest.context_length
        self.sinks, self.block, self.dropped = 0, 0, 0
        if overflow == "shift":
            most = context // 2
            require(sinks <= most, "num_sink_tokens", sinks, f"a whole number from 0 to {most}, half the context")
            require_shift(engine.manifest)
            if engine.manifest.window is not None:  # a sliding window hides the first tokens anyway
                sinks = 0
            self.sinks, self.block = sinks, max(1, (context - sinks) // 2)

    def checked(self, ids: Sequence[int]) -> list[int]:
        """`ids` (T,) as a list. Counts those beyond the context as dropped; they are never computed.

        Raises InputError for ids outside the vocabulary, and for too many ids if eviction is off.
        """
        context = self._context
        if not self.block and len(ids) > context and not self._engine.manifest.shift.refused:
            raise InputError(
                f"the prompt has {len(ids)} tokens; the context is {context}: shorten the text, export with a larger "
                "--context, or drop its oldest tokens (--context-overflow shift)"
            )
        if not self.block or len(ids) <= context:
            found: list[int] = self._engine.checked(ids, ndim=1, start=0).tolist()
            return found
        parts = [ids[start : start + context] for start in range(0, len(ids), context)]
        found = [token for part in parts for token in self._engine.checked(part, ndim=1, start=0).tolist()]
        self.dropped += self.excess(len(found), 0)
        return found

    def most(self, wanted: int, prompt_tokens: int) -> int:
        """The number of new tokens that fit behind the prompt, at most `wanted`."""
        # The last token is never run, so it may be one position behind the context.
        return wanted if self.block else min(wanted, self._context - prompt_tokens + 1)

    def of(self, ids: list[int]) -> list[int]:
        """The part of `ids` that is in the context."""
        return ids[: self.sinks] + ids[self.sinks + self.dropped :] if self.dropped else ids

    def missing(self, ids: list[int], length: int) -> list[int]:
        """The part of `ids` that a cache of `length` tokens lacks."""
        if length < self.sinks:
            return self.of(ids)[length:]
        return ids[length + self.dropped :]

    def excess(self, length: int, tokens: int) -> int:
        """The number of tokens to evict from a context of `length`, to make room for `tokens` more."""
        over = length + tokens - self._context
        if not self.block or over <= 0:
            return 0
        return min(math.ceil(over / self.block) * self.block, length - self.sinks)

    def chunk_sizes(self, engine: Engine, tokens: int, chunk_size: int | None) -> list[int]:
        """The tokens of each run of a prefill; at most `block` each where the cache lacks room for all."""
        sizes = engine.chunk_sizes(tokens, chunk_size)
        if self.block and tokens > self._context - engine.length:
            sizes = engine.chunk_sizes(tokens, min(self.block, sizes[0]))
        return sizes

    def make_room(self, engine: Engine, tokens: int) -> None:
        """Evicts the oldest tokens if the cache lacks room for `tokens` more."""
        gone = self.excess(engine.length, tokens)
        if gone:
            engine.shift(self.sinks, gone)
            self.dropped += gone

"""Which tokens of a text are in the context, where the text may be longer: the first few, and the newest."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pastkey.errors import InputError
from pastkey.values import require

from ..engine.engine import Engine
from ..engine.shift import require_shift
from ..settings import NUM_SINK_TOKENS, ContextOverflow, require_valid


class KeptTokens:
    """The tokens of one text that its cache has, or is to have.

    With "shift", the first `sinks` tokens stay, and half of the others go at a time, the oldest ones: a move of the
    whole cache then comes once in so many tokens.

    Attributes:
        sinks: So many of the first tokens stay.
        block: So many go at a time; 0 where none may go.
        dropped: So many are gone, behind the sinks.
    """

    def __init__(self, engine: Engine, overflow: ContextOverflow = "error", sinks: int = NUM_SINK_TOKENS) -> None:
        """Raises InputError where an option is out of range, or the bundle's cache cannot be shifted."""
        self._engine = engine
        self._context = context = engine.manifest.context_length
        self.sinks, self.block, self.dropped = 0, 0, 0
        require_valid({"context_overflow": overflow, "num_sink_tokens": sinks})
        if overflow == "shift":
            most = context // 2
            require(sinks <= most, "num_sink_tokens", sinks, f"a whole number from 0 to {most}, half the context")
            require_shift(engine.manifest)
            if engine.manifest.window is not None:  # which no token sees any more, once it is that far
                sinks = 0
            self.sinks, self.block = sinks, max(1, (context - sinks) // 2)

    def checked(self, ids: Sequence[int]) -> list[int]:
        """`ids` (T,) as a list; those that are too many for the context are counted as dropped, and never computed.

        Raises InputError where they are none of the model's, or too many and none may go.
        """
        context, shift = self._context, self._engine.manifest.shift
        if not self.block and len(ids) > context and shift is not None and not shift.refused:
            raise InputError(
                f"the prompt has {len(ids)} tokens; the context is {context}: shorten the text, export with a larger "
                "--context, or let its oldest tokens go (--context-overflow shift)"
            )
        if not self.block or len(ids) <= context:
            found: list[int] = self._engine.checked(ids, ndim=1, start=0).tolist()
            return found
        parts = [ids[start : start + context] for start in range(0, len(ids), context)]
        found = [token for part in parts for token in self._engine.checked(part, ndim=1, start=0).tolist()]
        self.dropped += self.excess(len(found), 0)
        return found

    def most(self, wanted: int, prompt_tokens: int) -> int:
        """How many of `wanted` new tokens may follow the prompt."""
        # The last token of all need not be fed, so that it may stand one behind the context.
        return wanted if self.block else min(wanted, self._context - prompt_tokens + 1)

    def of(self, ids: list[int]) -> list[int]:
        """Those of a text that are in the context."""
        return ids[: self.sinks] + ids[self.sinks + self.dropped :] if self.dropped else ids

    def missing(self, ids: list[int], length: int) -> list[int]:
        """Those that a cache of so many tokens lacks."""
        if length < self.sinks:
            return self.of(ids)[length:]
        return ids[length + self.dropped :]

    def excess(self, length: int, tokens: int) -> int:
        """How many must go from so many in the context, for `tokens` more."""
        over = length + tokens - self._context
        if not self.block or over <= 0:
            return 0
        return min(math.ceil(over / self.block) * self.block, length - self.sinks)

    def chunk_sizes(self, engine: Engine, tokens: int, chunk_size: int | None) -> list[int]:
        """The tokens of each run of what a cache lacks: as few where there is no room as come into the context."""
        sizes = engine.chunk_sizes(tokens, chunk_size)
        if self.block and tokens > self._context - engine.length:
            sizes = engine.chunk_sizes(tokens, min(self.block, sizes[0]))
        return sizes

    def make_room(self, engine: Engine, tokens: int) -> None:
        """Drops the oldest tokens where the cache has no room for so many more."""
        gone = self.excess(engine.length, tokens)
        if gone:
            engine.shift(self.sinks, gone)
            self.dropped += gone

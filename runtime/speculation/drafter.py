"""What a draft model drafts for one text. It chooses as the text's sampler does: by the same settings and numbers.

A token is a function of logits, settings, seed and place. The draft model's logits are put into the same function, so
that its token is the text's wherever the two distributions put the place's number into the interval of one token
(coupling by common random numbers). A draft token is accepted where it is the one that the model's own logits give:
the text is that without a draft, drawn or greedy, and not only one of the same distribution.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np

from pastkey.errors import ResourceError

from ..engine.decoder_graph import Logits
from ..engine.engine import Engine
from .worth import Rate, Worth, observed

_log = logging.getLogger("pastkey")

Choose = Callable[[Logits, Sequence[int]], int]  # of logits (V,) and the text before: a token


class Allows(Protocol):
    """What new tokens are held to, as far as a draft asks."""

    def masked(self, logits: Logits) -> Logits:
        """Logits (V,) with minus infinity at the tokens that may not follow."""

    def allowed_draft(self, draft: Sequence[int]) -> list[int]:
        """The first tokens of a draft, as far as they may follow."""


class Follows(Allows, Protocol):
    """The whole of it, as the text itself asks: constraints/ has it."""

    def require(self, token: int) -> None:
        """Raises InputError unless the token may follow."""

    def follow(self, tokens: Sequence[int], start: int) -> None:
        """Takes in what is new of `tokens`, which are the text's from `start` on."""

    def restart(self) -> None:
        """Forgets all tokens."""

    def forced(self, most: int) -> list[int]:
        """The tokens that must follow, `most` at most."""

    @property
    def complete(self) -> bool:
        """Whether nothing may follow but the end."""


class Drafter:
    """Drafts for one text. Whatever fails in it ends the drafts and not the text.

    Attributes:
        made: Whether the last draft was the draft model's.
    """

    def __init__(
        self, worth: Worth, take: Callable[[Sequence[int], int], Engine], give_back: Callable[[Engine], object]
    ) -> None:
        """See DraftModel.

        Args:
            worth: What is known of other texts.
            take: Gives an engine with some of the first tokens of a text, which may come to so many.
            give_back: Gets it at the end.
        """
        self._worth, self._take, self._give_back = worth, take, give_back
        self._rate = Rate(worth.rate)
        self._engine: Engine | None = None
        self._on = True
        self._known = 0  # so many of the first tokens in the cache are the text's
        self._began = 0.0
        self.made = False

    def begin(self, choose: Choose, end_ids: Collection[int], vocab_size: int, constraint: Allows | None) -> None:
        """Takes in how the text's tokens are chosen, before its first draft."""
        self._choose, self._end_ids, self._vocab_size = choose, end_ids, vocab_size
        self._constraint = constraint

    def start(self) -> None:
        """A step begins."""
        self._began = self._worth.clock()

    def read(self) -> None:
        """Takes in that the step read a part of the prompt."""
        self._worth.note_prefill(self._worth.clock() - self._began)

    def draft(self, ids: Sequence[int], found: Sequence[int], most: int) -> list[int]:
        """`found`, a draft from elsewhere, or in place of none up to `most` tokens of the draft model.

        Args:
            ids: The text so far.
            found: It.
            most: How many tokens may still come.
        """
        worth, draft = self._worth, list(found)
        self.made = False
        if self._on and not draft:
            try:
                draft = self._draft(ids, most)
            except ResourceError:  # a text does without rather than fail
                self.stop()
            except Exception as error:
                _log.warning("the draft model failed, and this text goes on without: %s", error)
                self.stop()
        self._began = worth.clock()
        return draft

    def end(self, drafted: int, accepted: int) -> None:
        """Takes in how the step ended that ran the last draft."""
        self._worth.note_step(drafted + 1, self._worth.clock() - self._began)
        if self.made:
            self._worth.note_draft(drafted, accepted)
            for place in range(observed(drafted, accepted)):
                self._rate.note(place < accepted)

    def stop(self) -> None:
        """Drafts no more, and gives the cache back."""
        self._on = False
        engine, self._engine = self._engine, None
        if engine is not None:
            self._give_back(engine)

    def _draft(self, ids: Sequence[int], most: int) -> list[int]:
        if self._engine is None:
            self._engine = self._take(ids, len(ids) + most)
            self._known = self._engine.length
        engine = self._engine
        room = engine.manifest.context_length - len(ids) + 1
        if room < 1:
            self.stop()
            return []
        self._settle(ids)
        count = self._worth.tokens(self._rate.value, len(ids) - engine.length, most)
        if not count:
            return []
        runs: list[tuple[int, float]] = []
        try:
            return self._run(engine, ids, min(count, room), runs)
        finally:
            self._worth.note_drafting(runs)

    def _settle(self, ids: Sequence[int]) -> None:
        """Forgets in the cache what is not of the text, and of the text its last token, which is run for its logits."""
        engine = self._engine
        assert engine is not None
        cached = engine.cached_ids
        known, most = min(self._known, len(cached)), min(len(cached), len(ids) - 1)
        while known < most and cached[known] == ids[known]:
            known += 1
        if engine.length > known:
            if engine.can_trim(known):
                engine.trim(known)
            else:  # a window has left behind what the next token sees
                engine.empty()
                known = 0
        self._known = known

    def _run(self, engine: Engine, ids: Sequence[int], count: int, runs: list[tuple[int, float]]) -> list[int]:
        """Up to `count` draft tokens; none where the cache lacks so much that this step reads a part of it."""
        text, draft, missing, clock = [*ids], list[int](), list(ids[engine.length :]), self._worth.clock
        sizes = engine.chunk_sizes(len(missing))
        if len(sizes) > 1:
            engine.reserve(len(missing))
        whole, missing = len(sizes) == 1, missing[: sizes[0]]
        while True:
            started = clock()
            logits = engine.append(missing)
            token = self._next(logits, text, draft) if whole else None
            runs.append((len(missing), clock() - started))
            self.made = whole
            if token is None:
                return draft
            draft.append(token)
            text.append(token)
            if len(draft) == count:
                return draft
            missing = [token]

    def _next(self, logits: Logits, text: Sequence[int], draft: Sequence[int]) -> int | None:
        """The token that follows, or None where a draft ends: at an EOS token, or where a constraint cuts it."""
        size, constraint = self._vocab_size, self._constraint
        if logits.size != size:  # the same tokens, padded to another number
            logits = np.concatenate([logits[:size], np.full(max(0, size - logits.size), -np.inf, logits.dtype)])
        if constraint is not None and not draft:
            logits = constraint.masked(logits)
        token = self._choose(logits, text)
        if token in self._end_ids or (
            constraint is not None and not constraint.allowed_draft([*draft, token])[len(draft) :]
        ):
            return None
        return token

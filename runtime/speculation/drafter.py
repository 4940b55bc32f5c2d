"""Drafts by a draft model for one request. It samples with the settings and random numbers of the request's sampler.

A token is a function of logits, settings, seed and position. The same function takes the draft model's logits, so both
models choose the same token wherever both distributions map the position's random number to it (coupling by common
random numbers). A draft token is accepted if the model's own logits give the same token. So the output equals that
without drafts, sampled or greedy; it does not merely have the same distribution.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence

import numpy as np

from pastkey.errors import ResourceError

from ..constraints.matcher import Matcher
from ..engine.decoder_graph import Logits
from ..engine.engine import Engine
from .worth import Rate, Worth, observed

_log = logging.getLogger("pastkey")

Choose = Callable[[Logits, Sequence[int]], int]  # (logits (V,), ids before) -> token


class Drafter:
    """Drafts for one request. A failure ends the drafts, but not the request.

    Attributes:
        made: Whether the draft model made the last draft.
    """

    def __init__(
        self, worth: Worth, take: Callable[[Sequence[int], int], Engine], give_back: Callable[[Engine], object]
    ) -> None:
        """See DraftModel.

        Args:
            worth: Timings and acceptance over all requests.
            take: Returns a draft engine for (ids, limit of their number); its cache may hold a prefix of the ids.
            give_back: Called with that engine at the end.
        """
        self._worth, self._take, self._give_back = worth, take, give_back
        self._rate = Rate(worth.rate)
        self._engine: Engine | None = None
        self._on = True
        self._known = 0  # number of first tokens in the cache that are known to be the request's
        self._began = 0.0
        self.made = False

    def begin(self, choose: Choose, end_ids: Collection[int], vocab_size: int, constraint: Matcher | None) -> None:
        """Sets how the request's tokens are chosen. Called before the first draft."""
        self._choose, self._end_ids, self._vocab_size = choose, end_ids, vocab_size
        self._constraint = constraint

    def start(self) -> None:
        """Starts the clock of a step."""
        self._began = self._worth.clock()

    def read(self) -> None:
        """Records the end of a step that ran a chunk of the prefill."""
        self._worth.note_prefill(self._worth.clock() - self._began)

    def draft(self, ids: Sequence[int], found: Sequence[int], most: int) -> list[int]:
        """Returns `found`, or if it is empty, a draft of up to `most` tokens by the draft model.

        Args:
            ids: The ids so far.
            found: A draft by prompt lookup.
            most: Number of tokens that may still follow.
        """
        worth, draft = self._worth, list(found)
        self.made = False
        if self._on and not draft:
            try:
                draft = self._draft(ids, most)
            except ResourceError:  # without memory for the draft's cache the request goes on without drafts
                self.stop()
            except Exception as error:
                _log.warning("the draft model failed, and this text goes on without: %s", error)
                self.stop()
        self._began = worth.clock()
        return draft

    def end(self, drafted: int, accepted: int) -> None:
        """Records the time of the step that ran the last draft, and the accepted tokens."""
        self._worth.note_step(drafted + 1, self._worth.clock() - self._began)
        if self.made:
            self._worth.note_draft(drafted, accepted)
            for place in range(observed(drafted, accepted)):
                self._rate.note(place < accepted)

    def stop(self) -> None:
        """Ends drafting and returns the engine."""
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
        """Trims the cache to the request's ids, without the last one, which is run for its logits."""
        engine = self._engine
        assert engine is not None
        cached = engine.cached_ids
        known, most = min(self._known, len(cached)), min(len(cached), len(ids) - 1)
        while known < most and cached[known] == ids[known]:
            known += 1
        if engine.length > known:
            if engine.can_trim(known):
                engine.trim(known)
            else:  # a sliding window has evicted tokens that the next one sees
                engine.empty()
                known = 0
        self._known = known

    def _run(self, engine: Engine, ids: Sequence[int], count: int, runs: list[tuple[int, float]]) -> list[int]:
        """Up to `count` draft tokens; none if the cache lacks more than a chunk, of which this step runs only one."""
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
        """The next draft token, or None at the end of the draft: an EOS token, or one that the constraint refuses."""
        size, constraint = self._vocab_size, self._constraint
        if logits.size != size:  # the same vocabulary, padded to another size
            logits = np.concatenate([logits[:size], np.full(max(0, size - logits.size), -np.inf, logits.dtype)])
        if constraint is not None and not draft:
            logits = constraint.masked(logits)
        token = self._choose(logits, text)
        if token in self._end_ids or (
            constraint is not None and not constraint.allowed_draft([*draft, token])[len(draft) :]
        ):
            return None
        return token

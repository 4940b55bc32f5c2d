"""Drafts by a draft model for one request. It samples with the settings and random numbers of the request's sampler.

A token is a function of logits, settings, seed and position. The same function reads the draft model's logits, so both
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
from .draft_length import DraftLength

_log = logging.getLogger("pastkey")

REJECTIONS = 4  # drafts in a row without an accepted token after which the request continues without

Choose = Callable[[Logits, Sequence[int]], int]  # (logits (V,), ids before) -> token


class Drafter:
    """Drafts for one request. A failure ends the drafts, but not the request.

    Attributes:
        made: Whether the last call of `draft` made one, if only an empty one.
    """

    def __init__(self, take: Callable[[Sequence[int], int], Engine], give_back: Callable[[Engine], object]) -> None:
        """See DraftModel.

        Args:
            take: Returns a draft engine for (ids, limit of their number); its cache may hold a prefix of the ids.
            give_back: Called with that engine at the end.
        """
        self._take, self._give_back = take, give_back
        self._length = DraftLength()
        self._engine: Engine | None = None
        self._on = True
        self._known = 0  # number of first tokens in the cache that are known to be the request's
        self.made = False

    def begin(self, choose: Choose, end_ids: Collection[int], vocab_size: int, constraint: Matcher | None) -> None:
        """Sets how the request's tokens are chosen. Called before the first draft."""
        self._choose, self._end_ids, self._vocab_size = choose, end_ids, vocab_size
        self._constraint = constraint

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `ids`."""
        self.made = False
        if self._on and most > 0:
            try:
                return self._draft(ids, most)
            except ResourceError:  # without memory for the draft's cache the request continues without drafts
                self.stop()
            except Exception as error:
                _log.warning("the draft model failed, and this text continues without: %s", error)
                self.stop()
        return []

    def record(self, drafted: int, accepted: int) -> None:
        """Records the accepted tokens of the last draft. Drafting ends after REJECTIONS in a row."""
        self._length.record(drafted, accepted)
        if self._length.rejections == REJECTIONS:
            self.stop()

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
        return self._run(engine, ids, min(self._length.most, most, room))

    def _settle(self, ids: Sequence[int]) -> None:
        """Trims the cache to the request's ids, without the last one, which is run for its logits."""
        engine = self._engine
        assert engine is not None
        cached = engine.cached_ids
        known, most = min(self._known, len(cached)), min(len(cached), len(ids) - 1)
        while known < most and cached[known] == ids[known]:
            known += 1
        engine.cut(known)
        self._known = min(known, engine.length)

    def _run(self, engine: Engine, ids: Sequence[int], count: int) -> list[int]:
        """Up to `count` draft tokens; none if the cache lacks more than a chunk, of which this step runs only one."""
        text, draft, missing = [*ids], list[int](), list(ids[engine.length :])
        sizes = engine.chunk_sizes(len(missing))
        if len(sizes) > 1:
            engine.reserve(len(missing))
            engine.append(missing[: sizes[0]])
            return []
        while len(draft) < count:
            token = self._next(engine.append(missing), text, draft)
            self.made = True
            if not draft and engine.manifest.states:  # or a rejected draft would go back to the prompt
                engine.mark()
            if token is None:
                break
            draft.append(token)
            text.append(token)
            missing = [token]
        return draft

    def _next(self, logits: Logits, text: Sequence[int], draft: Sequence[int]) -> int | None:
        """The next draft token, or None at the end of the draft: an EOS token, or one that the constraint rejects."""
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

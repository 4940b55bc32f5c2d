"""The state of one request in its grammar: allowed tokens, forced tokens, and whether the output may end."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pastkey.errors import InputError

if TYPE_CHECKING:
    from llguidance import LLMatcher

Scores = npt.NDArray[np.floating]


class Matcher:
    """Tracks the output of one request, token by token."""

    def __init__(self, compiled: LLMatcher, size: int, end_ids: Collection[int]) -> None:
        """See Vocabulary. `compiled` stays unchanged. `size`: V, which is also the id of the end token."""
        self._compiled, self._size, self._end_ids = compiled, size, list(end_ids)
        self.restart()

    def restart(self) -> None:
        """Forgets all tokens."""
        self._matcher = self._compiled.deep_copy()
        self._allowed: npt.NDArray[np.bool_] | None = None  # (V + 1,), computed on demand
        self._complete = False
        self._taken = 0  # tokens

    @property
    def can_begin(self) -> bool:
        """Whether the grammar allows a first token, or the end."""
        allowed = self._mask()
        return not self._matcher.is_error() and bool(allowed.any())

    @property
    def complete(self) -> bool:
        """Whether the grammar is met and no token may follow."""
        if not self._complete and (self._matcher.is_stopped() or not self._mask()[: self._size].any()):
            self._require(self._matcher.is_accepting())
            self._complete = True
        return self._complete

    def masked(self, logits: Scores) -> Scores:
        """Logits (V,) with minus infinity at the tokens that may not follow. EOS may follow if the grammar is met."""
        follows = self._follows()
        self._require(bool(follows.any()))
        return np.where(follows, logits, logits.dtype.type(-np.inf))

    def require(self, token: int) -> None:
        """Raises InputError unless the token may follow."""
        if not self._follows()[token]:
            raise InputError(
                "the constraint and the call's token bans leave no allowed token: relax suppress_tokens, bad_words or "
                "the constraint"
            )

    def follow(self, tokens: Sequence[int], start: int) -> None:
        """Consumes the new ones of `tokens`, where `tokens[start:]` is the output. Raises InputError on a dead end."""
        for token in tokens[start + self._taken :]:
            self._allowed = None
            self._taken += 1
            self._require(self._matcher.consume_token(token))

    def forced(self, most: int) -> list[int]:
        """The forced tokens, at most `most`."""
        if self._complete:
            return []
        forced = self._matcher.compute_ff_tokens()[: max(0, most)]
        require_uninterrupted(self._matcher)
        return forced

    def allowed_draft(self, draft: Sequence[int]) -> list[int]:
        """The longest prefix of a draft that may follow."""
        allowed = self._matcher.validate_tokens(list(draft)) if draft else 0
        require_uninterrupted(self._matcher)
        return list(draft[:allowed])

    def _follows(self) -> npt.NDArray[np.bool_]:
        """Which tokens may follow, (V,)."""
        allowed = self._mask()
        if not allowed[self._size]:
            return allowed[: self._size]
        follows = allowed[: self._size].copy()
        follows[self._end_ids] = True
        return follows

    def _mask(self) -> npt.NDArray[np.bool_]:
        if self._allowed is None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._allowed = np.unpackbits(bits, count=self._size + 1, bitorder="little").view(np.bool_)
        return self._allowed

    def _require(self, followed: bool) -> None:
        """Raises InputError unless `followed` holds and llguidance is in no error state, which is permanent."""
        require_uninterrupted(self._matcher)
        if not followed or (self._matcher.is_error() and not self._matcher.is_accepting()):
            raise InputError(
                "the grammar leads to a place where this model's vocabulary cannot continue, or which is too complex "
                f"({first_sentence(self._matcher.get_error()) or 'no token may follow'}): simplify it, or use other "
                "characters"
            )


def require_uninterrupted(matcher: LLMatcher) -> None:
    """Raises the KeyboardInterrupt that llguidance swallowed. The matcher has then lost its state."""
    if matcher.is_error() and matcher.get_error().startswith("panic:") and "KeyboardInterrupt" in matcher.get_error():
        raise KeyboardInterrupt


def first_sentence(message: str) -> str:
    """The error of an llguidance message, in one line."""
    lines = [line.strip() for line in message.replace("<non-verbose/>", "").splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith("error: ")), lines[0] if lines else "")
    return told.removeprefix("error: ")[:200].rstrip(" :.")

"""Where a text stands in its grammar: which tokens may follow, which must, and whether it may end."""

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
    """Follows one text, token by token."""

    def __init__(self, compiled: LLMatcher, size: int, end_ids: Collection[int]) -> None:
        """See Vocabulary. `compiled` is not changed. `size`: V, the id that stands for the end."""
        self._compiled, self._size, self._end_ids = compiled, size, list(end_ids)
        self.restart()

    def restart(self) -> None:
        """Forgets all tokens."""
        self._matcher = self._compiled.deep_copy()
        self._allowed: npt.NDArray[np.bool_] | None = None  # (V + 1,), once it is asked for
        self._complete = False
        self._taken = 0  # tokens

    @property
    def can_begin(self) -> bool:
        """Whether some text meets the grammar, as far as can be told before its first token."""
        allowed = self._mask()
        return not self._matcher.is_error() and bool(allowed.any())

    @property
    def complete(self) -> bool:
        """Whether the grammar is met and nothing may follow."""
        if not self._complete and (self._matcher.is_stopped() or not self._goes_on()):
            self._require(self._matcher.is_accepting())
            self._complete = True
        return self._complete

    def masked(self, logits: Scores) -> Scores:
        """Logits (V,) with minus infinity at the tokens that may not follow. EOS may where the grammar is met."""
        follows = self._follows()
        self._require(bool(follows.any()))
        return np.where(follows, logits, logits.dtype.type(-np.inf))

    def require(self, token: int) -> None:
        """Raises InputError unless the token may follow."""
        if not self._follows()[token]:
            raise InputError(
                "no token is left to choose from: a constraint allows some of them, and the call's other options none "
                "of these; leave out what bans or forces tokens"
            )

    def follow(self, tokens: Sequence[int], start: int) -> None:
        """Takes in what is new of `tokens`, which are the text's from `start` on. Raises InputError."""
        for token in tokens[start + self._taken :]:
            self._allowed = None
            self._taken += 1
            self._require(self._matcher.consume_token(token))

    def forced(self, most: int) -> list[int]:
        """The tokens that must follow, `most` at most."""
        if self._complete:
            return []
        forced = self._matcher.compute_ff_tokens()[: max(0, most)]
        require_uninterrupted(self._matcher)
        return forced

    def allowed_draft(self, draft: Sequence[int]) -> list[int]:
        """The first tokens of a draft, as far as they may follow."""
        allowed = self._matcher.validate_tokens(list(draft)) if draft else 0
        require_uninterrupted(self._matcher)
        return list(draft[:allowed])

    def _goes_on(self) -> bool:
        """Whether a token may follow as text."""
        return bool(self._mask()[: self._size].any())

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
        """Raises InputError unless the text could be followed. The library says so by a state that stays."""
        require_uninterrupted(self._matcher)
        if not followed or (self._matcher.is_error() and not self._matcher.is_accepting()):
            raise InputError(
                "the grammar leads to a place from which this model's vocabulary cannot go on, or which is too complex "
                f"({first_sentence(self._matcher.get_error()) or 'no token may follow'}): ask for less, or for other "
                "characters"
            )


def require_uninterrupted(matcher: LLMatcher) -> None:
    """Raises KeyboardInterrupt where one came within llguidance, which swallows it and has lost its place."""
    if matcher.is_error() and matcher.get_error().startswith("panic:") and "KeyboardInterrupt" in matcher.get_error():
        raise KeyboardInterrupt


def first_sentence(message: str) -> str:
    """What llguidance says is wrong, in one line."""
    lines = [line.strip() for line in message.replace("<non-verbose/>", "").splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith("error: ")), lines[0] if lines else "")
    return told.removeprefix("error: ")[:200].rstrip(" :.")

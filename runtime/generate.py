"""The engine: one token after another from a session. It knows ids, not text; printing belongs to the command."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from pastkey.errors import InputError

from .lookahead import GUESSES, Lookahead
from .sampling import Sampler
from .session import Logits, Session
from .settings import SamplingConfig, is_int

FinishReason = Literal["stop", "length"]


class Generation:
    """One continuation, as an iterator over its new tokens.

    It ends at an end token, which is not yielded ("stop"), or after `max_new_tokens` or at the end of the context
    ("length"). `finish_reason` is None until then, and the times in seconds are complete then.
    """

    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        end_ids: Collection[int] = (),
        sampling: SamplingConfig | None = None,
        reuse_prefix: bool = False,
        lookahead: bool = True,
    ) -> None:
        """Takes the session over: its cache is reset, or with `reuse_prefix` kept as far as the prompt begins with it.

        With `lookahead`, several tokens are tried in one step where the text has said the same before; see `lookahead`.
        Raises InputError for a prompt that the model cannot take.
        """
        context = session.manifest.context_length
        if not is_int(max_new_tokens) or max_new_tokens < 0:
            raise InputError(f"max_new_tokens is {max_new_tokens}; it must be a whole number from 0")
        if len(prompt) == 0:
            raise InputError("the prompt is empty: give at least one token to continue from")
        with session.lock:
            if reuse_prefix:
                self.reused_tokens = session.rewind(prompt)
            else:
                self.reused_tokens = 0
                session.reset()
            session.checked(prompt[self.reused_tokens :], ndim=1)
            self._owned = session.resets
        self.prompt_tokens = len(prompt)
        self.new_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        # The last token of all need not be fed, so that it may stand one behind the context.
        self._limit = min(max_new_tokens, context - len(prompt) + 1)
        self._sample = Sampler(sampling or SamplingConfig())
        self._end_ids = frozenset(end_ids)
        self._lookahead = Lookahead() if lookahead and session.can_try else None
        self._tokens = self._generate(session, list(prompt))

    def __iter__(self) -> Iterator[int]:
        return self._tokens

    def __next__(self) -> int:
        return next(self._tokens)

    def _generate(self, session: Session, ids: list[int]) -> Iterator[int]:
        # Another thread may take the session over between two steps, but not within one.
        with session.lock:
            self._require_ownership(session)
            started = time.perf_counter()
            logits = session.prefill(ids[self.reused_tokens :])[None]
            self.prefill_seconds = time.perf_counter() - started
        guesses: list[int] = []
        while self.new_tokens < self._limit:
            started = time.perf_counter()
            with session.lock:
                if self.new_tokens:
                    self._require_ownership(session)
                    guesses = self._guess(session, ids)
                    logits = session.extend([ids[-1], *guesses])
                chosen = self._choose(logits, guesses, ids)
                if len(chosen) < len(logits):
                    session.trim(session.length - len(logits) + len(chosen))
            self.decode_seconds += time.perf_counter() - started
            for token in chosen:
                self._require_ownership(session)
                if token in self._end_ids:
                    self.finish_reason = "stop"
                    return
                self.new_tokens += 1
                yield token
        self.finish_reason = "length"

    def _guess(self, session: Session, ids: Sequence[int]) -> list[int]:
        """Tokens to try behind the last of `ids`, which is fed for certain."""
        if self._lookahead is None:
            return []
        room = session.manifest.context_length - session.length - 1
        return self._lookahead.guess(ids, min(GUESSES, room, self._limit - self.new_tokens - 1))

    def _choose(self, logits: Logits, guesses: Sequence[int], ids: list[int]) -> list[int]:
        """Tokens by the logits (T, V), up to the first that is not what was guessed. Appends them to `ids`."""
        chosen: list[int] = []
        for place, row in enumerate(logits):
            token = self._sample(row, ids)
            chosen.append(token)
            ids.append(token)
            if token in self._end_ids or place == len(guesses) or token != guesses[place]:
                break
        if self._lookahead is not None and guesses:
            self._lookahead.judge(len(chosen) - 1)
        return chosen

    def _require_ownership(self, session: Session) -> None:
        if session.resets != self._owned:
            raise InputError(
                "another generation began on this model before this one ended: finish one before the next, or load "
                "the bundle once for each"
            )

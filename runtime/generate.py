"""One token after another from an engine. It knows ids, not text; printing belongs to the command."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from pastkey.errors import InputError
from pastkey.values import is_int

from .engine.engine import Engine, Logits
from .sampling.prompt_lookup import PromptLookup
from .sampling.sampler import Sampler
from .settings import MAX_DRAFT_TOKENS, SamplingConfig

FinishReason = Literal["stop", "length"]


class Generation:
    """One continuation, as an iterator over its new tokens.

    It ends at an EOS token, which is not yielded ("stop"), or after `max_new_tokens` or at the end of the context
    ("length"). `finish_reason` is None until then, and the times in seconds are complete then.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        end_ids: Collection[int] = (),
        sampling: SamplingConfig | None = None,
        reuse_prefix: bool = False,
        prompt_lookup: bool = True,
    ) -> None:
        """Leaves the engine alone until the first token is asked for.

        Then its cache is reset, or with `reuse_prefix` kept as far as the prompt begins with it. With `prompt_lookup`,
        draft tokens are run in one step where the text has said the same before.
        Raises InputError for a prompt that the model cannot take.
        """
        if not is_int(max_new_tokens) or max_new_tokens < 0:
            raise InputError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number from 0")
        if len(prompt) == 0:
            raise InputError("the prompt is empty: give at least one token to continue from")
        ids: list[int] = engine.checked(prompt, ndim=1, start=0).tolist()
        self.prompt_tokens = len(ids)
        self.reused_tokens = 0
        self.new_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        # The last token of all need not be fed, so that it may stand one behind the context.
        self._limit = min(max_new_tokens, engine.manifest.context_length - len(ids) + 1)
        self._sample = Sampler(sampling or SamplingConfig())
        self._end_ids = frozenset(end_ids)
        self._reuse_prefix = reuse_prefix
        self._prompt_lookup = PromptLookup() if prompt_lookup and engine.supports_drafts else None
        self._tokens = self._generate(engine, ids)

    def __iter__(self) -> Iterator[int]:
        return self._tokens

    def __next__(self) -> int:
        return next(self._tokens)

    def _generate(self, engine: Engine, ids: list[int]) -> Iterator[int]:
        # Another thread may take the engine over between two steps, but not within one.
        with engine.lock:
            if self._reuse_prefix:
                self.reused_tokens = engine.keep_prefix(ids)
            else:
                engine.reset()
            self._owned = engine.resets
            started = time.perf_counter()
            logits = engine.prefill(ids[self.reused_tokens :])[None]
            self.prefill_seconds = time.perf_counter() - started
        draft: list[int] = []
        while self.new_tokens < self._limit:
            started = time.perf_counter()
            with engine.lock:
                if self.new_tokens:
                    self._require_ownership(engine)
                    draft = self._draft(engine, ids)
                    logits = engine.extend([ids[-1], *draft])
                chosen = self._choose(logits, draft, ids)
                if len(chosen) < len(logits):
                    engine.trim(engine.length - len(logits) + len(chosen))
            self.decode_seconds += time.perf_counter() - started
            for token in chosen:
                self._require_ownership(engine)
                if token in self._end_ids:
                    self.finish_reason = "stop"
                    return
                self.new_tokens += 1
                yield token
        self.finish_reason = "length"

    def _draft(self, engine: Engine, ids: Sequence[int]) -> list[int]:
        """Draft tokens to run behind the last of `ids`, which is fed for certain."""
        if self._prompt_lookup is None:
            return []
        room = engine.manifest.context_length - engine.length - 1
        return self._prompt_lookup.draft(ids, min(MAX_DRAFT_TOKENS, room, self._limit - self.new_tokens - 1))

    def _choose(self, logits: Logits, draft: Sequence[int], ids: list[int]) -> list[int]:
        """Tokens by the logits (T, V), up to the first that rejects the draft's. Appends them to `ids`."""
        chosen: list[int] = []
        for place, row in enumerate(logits):
            token = self._sample(row, ids)
            chosen.append(token)
            ids.append(token)
            if token in self._end_ids or place == len(draft) or token != draft[place]:
                break
        if self._prompt_lookup is not None and draft:
            self._prompt_lookup.record(len(chosen) - 1)
        return chosen

    def _require_ownership(self, engine: Engine) -> None:
        if engine.resets != self._owned:
            raise InputError(
                "another generation began on this model before this one ended: finish one before the next, or load "
                "the bundle once for each"
            )

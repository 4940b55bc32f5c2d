"""Decode one request, from the token ids of its prompt to its last new token.

A Generation is an iterator over the new tokens. A Stream reads it and makes text of the ids.

1. The constructor checks the prompt's ids and builds the Sampler and the Speculator.
2. The first `next` starts the timeout. `begin` gets an engine from the Lifecycle; its KV cache may hold a prefix.
3. Prefill: each `step` runs one chunk of the prompt. The logits of the last chunk give the first token.
4. Decode: each `step` runs the last token with its draft tokens. `take` samples at each position and accepts the draft
   up to the first token that differs from the sampled one. Only `take` samples.
5. `jump` appends the tokens that a constraint forces. The next step runs them together, without sampling.
6. An EOS token or a met constraint ("stop"), a limit ("length"), `cancel` or the timeout ends the request.
7. `close` leaves the Lifecycle. `retire` drops the tokens that were never read and passes the engine on.

The Lifecycle calls the steps: `Alone` for one request on one engine, a Scheduler for all requests of a graph. The
Scheduler also decodes several requests in one batch and hands each its logits through `take_together`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from threading import TIMEOUT_MAX
from typing import Literal, Protocol

import numpy as np

from pastkey.errors import InputError, NumericsError

from ..engine.engine import Engine, Logits
from ..sampling.log_probs import TokenLogprob, token_logprob
from ..sampling.sampler import Sampler
from ..speculation.speculator import Speculator
from .kept_tokens import KeptTokens
from .request import Request

_NEWEST = 0.2  # weight of the newest step in a moving average

FinishReason = Literal["stop", "length", "cancelled", "deadline"]


class Lifecycle(Protocol):
    """Runs the steps of a generation and owns its engine before and after."""

    def starting(self, generation: Generation) -> object:
        """Called before the first step, by the thread that reads. Raises if the generation may not begin."""

    def provide(self, generation: Generation) -> tuple[Engine, int]:
        """Returns an engine and the number of prompt tokens in its cache. Called once, at the first step."""

    def advance(self, generation: Generation) -> None:
        """Runs steps, or waits, until the generation is `ready`."""

    def leave(self, generation: Generation) -> None:
        """Removes a closed generation, at once or after the running step. Never waits."""

    def retired(self, generation: Generation) -> None:
        """Called after the last step, to pass the engine on."""


class Alone:
    """The lifecycle of one generation on one engine: each `next` runs the steps itself."""

    def starting(self, generation: Generation) -> None:
        """Does nothing."""

    def provide(self, generation: Generation) -> tuple[Engine, int]:
        """Returns the generation's own engine. Keeps the shared prefix of its cache if the request allows it."""
        engine, request = generation.engine, generation.request
        if request.reuse_prefix:
            return engine, engine.keep_prefix(generation.kept_ids, exact=request.exact)
        engine.reset()
        return engine, 0

    def advance(self, generation: Generation) -> None:
        """Runs one step. Another generation may use the engine between two steps."""
        try:
            generation.begin()
            generation.require_ownership()
            if not generation.ready:
                generation.step()
        except BaseException:
            generation.restart()
            raise

    def leave(self, generation: Generation) -> None:
        """Retires the generation at once."""
        generation.retire()

    def retired(self, generation: Generation) -> None:
        """Does nothing: the engine belongs to the caller."""


class Generation:
    """The decoding of one request, as an iterator over its new tokens.

    It ends at an EOS token, which it does not yield, or when the constraint is met ("stop"), after `max_new_tokens` or
    at the end of the context ("length"), after `cancel` ("cancelled"), or when the timeout expires ("deadline").
    `finish_reason` is None until then; the times, in seconds, are complete then.

    `ids` are the source of truth, and the cache follows them: each step runs the ids that the cache lacks. That is the
    last of `kept_ids`, or all of them after an exception.

    Attributes:
        request: The prompt and its options.
        ids: Ids of the prompt and of the new tokens. The last few may not be yielded yet.
        engine: The graph with the KV cache, from the first step on.
        begun: Whether `engine` was provided.
        kept: Which of `ids` are in the context.
        deadline: The time.monotonic() at which it ends; infinite without a timeout.
        logprobs: Log-probabilities of the new tokens, if requested.
        prompt_logprobs: Log-probabilities of the prompt's tokens, if requested; None for the first.
        tokens_per_step: Moving average of the new tokens per step when decoded alone; drafts raise it above 1.
        forced_tokens: Number of tokens that the constraint forced.
    """

    def __init__(self, engine: Engine, request: Request, lifecycle: Lifecycle | None = None) -> None:
        """Does not touch the engine before the first `next`.

        Args:
            engine: The graph, and the cache unless the lifecycle provides another.
            request: The prompt and its options.
            lifecycle: Runs the steps; None for `Alone`.

        Raises:
            InputError: The prompt does not fit the model, or an option is out of range.
        """
        self.request, self.engine = request, engine
        self.kept = KeptTokens(engine, request.context_overflow, request.num_sink_tokens)
        prompt = request.prompt
        self.ids = engine.checked(prompt, 1, start=0).tolist() if request.prompt_logprobs else self.kept.checked(prompt)
        self.prompt_tokens = len(self.ids)
        self.cached_tokens = 0
        self.draft_tokens = 0
        self.accepted_tokens = 0
        self.forced_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.closed = False  # no token will be read any more
        self.error: BaseException | None = None
        self._limit = self.kept.most(request.max_new_tokens, len(self.ids))
        self._end_ids = frozenset(request.end_ids)
        self._sample = Sampler(
            request.sampling,
            prompt_tokens=len(self.ids),
            max_new_tokens=self._limit,
            end_ids=request.end_ids,
            vocab_size=engine.manifest.vocab_size,
            breakers=request.breakers,
            library="" if engine.graph.native is None else engine.graph.native.library,
        )
        self._top = request.logprobs
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] = [None] * len(self.ids) if request.prompt_logprobs else []
        constraint, drafter = request.constraint, request.drafter
        self._constraint = constraint
        self._speculator = Speculator(
            prompt_lookup=request.prompt_lookup and engine.graph.supports_drafts,
            drafter=drafter if engine.graph.supports_drafts else None,
            constraint=constraint,
        )
        if drafter is not None:
            drafter.begin(self._sample.twin(), self._end_ids, engine.manifest.vocab_size, constraint)
        self.deadline = math.inf
        self._lifecycle: Lifecycle = lifecycle or Alone()
        self._started = False
        self.begun = False
        self._yielded = len(self.ids)
        # Without new tokens there are steps only for the log-probabilities of a prompt, whose first token has none.
        self._ending: FinishReason | None = None if self._limit or len(self.prompt_logprobs) > 1 else "length"
        self._jumped = False  # whether `jump` ran after the newest of `ids`
        self._seen = 0  # length of `ids` at the last check for the end
        self.tokens_per_step = 1.0
        self._resets = engine.resets
        self._logits: Logits | None = None  # of the newest step, (1, T, V)
        self._rows: list[Logits] = []  # its rows (V,)

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        while not self.closed:
            if self._yielded < len(self.ids) and not self._overdue() and self._ending not in ("cancelled", "deadline"):
                token = self.ids[self._yielded]
                self.require_ownership()
                self._yielded += 1
                return token
            if self.ended:
                self.close()
                if self.error is not None:
                    raise self.error
                break
            started = time.perf_counter()
            try:
                if not self._started:
                    self._start()
                self._lifecycle.advance(self)
            finally:
                if self.new_tokens:
                    self.decode_seconds += time.perf_counter() - started
                else:
                    self.prefill_seconds += time.perf_counter() - started
        raise StopIteration

    @property
    def new_tokens(self) -> int:
        """Number of yielded tokens."""
        return self._yielded - self.prompt_tokens

    @property
    def kept_ids(self) -> list[int]:
        """The part of `ids` that is in the context."""
        return self.kept.of(self.ids)

    @property
    def ready(self) -> bool:
        """Whether `next` can return a token, or end, without a step."""
        return self._yielded < len(self.ids) or self.ended

    @property
    def ended(self) -> bool:
        """Whether no step follows."""
        return self.closed or self.error is not None or self._ending is not None or self._overdue()

    @property
    def most_tokens(self) -> int:
        """Upper limit of the length of `ids`."""
        return self.prompt_tokens + self._limit

    @property
    def ahead(self) -> int:
        """Number of tokens that are decoded and not yet read."""
        return len(self.ids) - self._yielded

    def cancel(self) -> None:
        """Ends the generation within one step. May be called from any thread. Yielded tokens stay."""
        if self._ending is None:
            self._ending = "cancelled"

    def fail(self, error: BaseException) -> None:
        """Ends the generation with an error, which the next `next` raises."""
        self.error = error

    def close(self) -> None:
        """Ends the generation and drops unread tokens. Never waits."""
        if self.closed:
            return
        self._overdue()
        if self.error is None and self.finish_reason is None:
            self.finish_reason = self._ending or "cancelled"
        self.closed = True
        self._lifecycle.leave(self)

    def _overdue(self) -> bool:
        if self.deadline < math.inf and self._ending is None and time.monotonic() >= self.deadline:
            self._ending = "deadline"
        return self._ending == "deadline"

    def _start(self) -> None:
        self._lifecycle.starting(self)
        self._started = True
        if self.request.timeout is not None:
            self.deadline = time.monotonic() + min(self.request.timeout, TIMEOUT_MAX)

    # --- steps, called by the Lifecycle -------------------------------------------------------------------------------
    def begin(self) -> None:
        """Gets an engine, whose cache may hold a prefix of the prompt. Runs once, before the first step."""
        if self.begun:
            return
        self.engine, self.cached_tokens = self._lifecycle.provide(self)
        self._resets = self.engine.resets
        self.begun = True

    def restart(self) -> None:
        """Drops the cache after an exception in a step. The next step runs `ids` again."""
        if self.begun and self.engine.resets == self._resets:
            self.engine.drop_cache()
        if self._constraint is not None:
            self._constraint.restart()
        self._seen, self._jumped = 0, False

    @property
    def pending(self) -> int:
        """Number of `ids` that the cache lacks: 1 when the next step decodes."""
        count = len(self.ids) - self.kept.dropped
        return count - min(self.engine.length, count - 1) if self.begun else count

    def step(self, chunk_size: int | None = None) -> None:
        """Runs this sequence alone: one chunk of a prefill, or the last token followed by a draft."""
        engine = self.engine
        if not self._jumped:
            self.jump()
            if self.ended:
                return
        missing = self.kept.missing(self.ids, engine.length)
        if len(missing) == 1:
            self.kept.make_room(engine, 1)
            draft = self._speculator.draft(self.ids, self._room)
            try:
                ids = np.array([[*missing, *draft]]) if draft else missing[0]  # making an array costs 15 us
                logits = engine.run(ids, keep=1 + len(draft))
            except NumericsError:
                if not draft:
                    raise
                # NaN in the keys or values of a draft token also reaches the positions before it. The token may be
                # one that the sampler would reject.
                draft = []
                self._speculator.stop()
                logits = engine.run(missing[0])
            accepted = self.accepted_tokens
            if logits is not self._logits:  # a run overwrites those before
                self._logits, self._rows = logits, list(logits[0])
            self._count(self.take(self._rows, draft))
            self._speculator.end(len(draft), self.accepted_tokens - accepted)
            if draft:
                self._settle()
            self.jump()
            return
        sizes = self.kept.chunk_sizes(engine, len(missing), chunk_size)
        self.kept.make_room(engine, sizes[0])
        if len(sizes) > 1:
            engine.reserve(min(len(missing), engine.manifest.context_length - engine.length))
        chunk = missing[: sizes[0]]
        logits = self._read_with_logprobs(chunk) if self.prompt_logprobs else engine.run(np.array([chunk]))[0, -1]
        if not self._limit and None not in self.prompt_logprobs[1:]:
            self._ending = self._ending or "length"
        elif len(sizes) == 1:
            self.take(logits[None], [])
            self.jump()

    def _read_with_logprobs(self, ids: Sequence[int]) -> Logits:
        """Runs prompt tokens (T,) and records their log-probabilities. Returns the last one's logits (V,)."""
        start = self.engine.length
        logits = self.engine.all_logits(ids)
        for place, row in enumerate(logits[: self.prompt_tokens - start - 1], start + 1):
            self.prompt_logprobs[place] = token_logprob(row, self.ids[place], self._top or 0)
        last: Logits = logits[-1]
        return last

    def _settle(self) -> None:
        """Trims the cache to `ids`: drops rejected draft tokens and tokens that were never read."""
        self.engine.cut(len(self.ids) - self.kept.dropped - (not self.ended))  # a next step runs the last token

    def retire(self) -> None:
        """Drops unread tokens from `ids` and from the cache, and passes the engine on. No step may run or follow."""
        if self.begun and self.engine.resets != self._resets:  # another generation has used the engine
            return
        del self.ids[self._yielded :]
        if self.begun:
            self._settle()
        self._speculator.stop()
        self._logits, self._rows = None, []  # the newest step's are large
        self._lifecycle.retired(self)

    def take(self, logits: Iterable[Logits], draft: Sequence[int]) -> int:
        """Samples tokens from the logits (T, V) up to the first that differs from the draft; appends them to `ids`.

        Returns their number.
        """
        accepted, before, constraint = 0, len(self.ids), self._constraint
        self._jumped = False
        for place, row in enumerate(logits):
            token = self._sample(row if constraint is None else constraint.masked(row), self.ids)
            if constraint is not None:
                constraint.require(token)
            if token in self._end_ids:
                self._ending = self._ending or "stop"
                break
            if self._top is not None:
                self.logprobs[len(self.ids) - self.prompt_tokens :] = [token_logprob(row, token, self._top)]
            self.ids.append(token)
            self._see_whether_it_ends()
            if self._ending is not None or place == len(draft) or token != draft[place]:
                break
            accepted += 1
        self.draft_tokens += len(draft)
        self.accepted_tokens += accepted
        return len(self.ids) - before

    def make_ready(self) -> None:
        """Prepares for a batched step."""
        self.jump()
        self.kept.make_room(self.engine, 1)

    def jump(self) -> None:
        """Appends the tokens that the constraint forces. The next step runs them at once, as in a prefill."""
        if self._jumped:
            return
        self._see_whether_it_ends()
        # With logprobs every token is sampled: each needs its own logits.
        if self._constraint is not None and self._ending is None and self._top is None:
            forced = self._constraint.forced(self.most_tokens - len(self.ids))
            count = next((place for place, token in enumerate(forced) if token in self._end_ids), len(forced))
            self.ids += forced[:count]
            self.forced_tokens += count
            self._see_whether_it_ends()
            if count < len(forced):
                self._ending = self._ending or "stop"
        self._jumped = True

    def _see_whether_it_ends(self) -> None:
        """Ends the generation if the constraint is met or the limit is reached."""
        if self._seen == len(self.ids):
            return
        if self._constraint is not None:
            self._constraint.follow(self.ids, self.prompt_tokens)
            if self._constraint.complete:
                self._ending = self._ending or "stop"
        if self._limit and len(self.ids) >= self.most_tokens:
            self._ending = self._ending or "length"
        self._seen = len(self.ids)

    def take_together(self, logits: Logits) -> None:
        """As `take` for the logits (1, V) of a batched run, without a draft. Counts the tokens of a supposed draft."""
        self._speculator.guess(self.ids, self._room)
        token, chosen = self.ids[-1] if self.take(logits, []) else None, len(self.ids)
        self.jump()
        if tokens := self._speculator.came(token, more=len(self.ids) > chosen):
            self._count(tokens)

    def _count(self, tokens: int) -> None:
        self.tokens_per_step += _NEWEST * (tokens - self.tokens_per_step)

    @property
    def _room(self) -> int:
        """Number of draft tokens that the context and the token limit allow."""
        room = self.engine.manifest.context_length - self.engine.length - 1
        return min(room, self.most_tokens - len(self.ids) - 1)

    def require_ownership(self) -> None:
        """Raises InputError if another generation has used the engine."""
        if self.begun and self.engine.resets != self._resets:
            raise InputError(
                "another generation began on this engine before this one ended: finish one before the next, or give "
                "each a separate engine"
            )

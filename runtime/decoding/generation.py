"""One token after another from an engine. It knows ids, not text; printing belongs to the command.

A Generation is one continuation as a machine of steps. Alone it runs its own steps; a Scheduler runs those of several.
A token is chosen in `take`, and nowhere else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
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

_NEWEST = 0.2  # the share of the newest step in an average

FinishReason = Literal["stop", "length", "cancelled", "deadline"]


class Lifecycle(Protocol):
    """What surrounds the steps of a generation."""

    def starting(self, generation: Generation) -> object:
        """Is told by whoever asks for the first token. Raises where it may not begin."""

    def provide(self, generation: Generation) -> tuple[Engine, int]:
        """An engine, and how many of the prompt's tokens are in its cache, when the first step comes."""

    def advance(self, generation: Generation) -> None:
        """Returns when the generation is `ready`."""

    def leave(self, generation: Generation) -> None:
        """Forgets a generation that has ended, now or after the step that runs. Never waits."""

    def retired(self, generation: Generation) -> None:
        """Is told when no step follows, to hand the engine on."""


class Alone:
    """The lifecycle of a generation that runs its own steps over one engine."""

    def starting(self, generation: Generation) -> None:
        """Nothing."""

    def provide(self, generation: Generation) -> tuple[Engine, int]:
        """The engine it was made with, as far as its cache may be reused."""
        engine, request = generation.engine, generation.request
        if request.reuse_prefix:
            return engine, engine.keep_prefix(generation.kept_ids, exact=request.exact)
        engine.reset()
        return engine, 0

    def advance(self, generation: Generation) -> None:
        """One step. Another thread may take the engine over between two steps, but not within one."""
        with generation.engine.lock:
            try:
                generation.begin()
                generation.require_ownership()
                if not generation.ready:
                    generation.step()
            except BaseException:
                generation.restart()
                raise

    def leave(self, generation: Generation) -> None:
        """At once."""
        generation.retire()

    def retired(self, generation: Generation) -> None:
        """Nothing: the engine is the caller's."""


class Generation:
    """One continuation, as an iterator over its new tokens.

    It ends at an EOS token, which is not yielded, or where a constraint is met ("stop"), after `max_new_tokens` or at
    the end of the context ("length"), after `cancel` ("cancelled"), or when its time is over ("deadline").
    `finish_reason` is None until then, and the times in seconds are complete then.

    `ids` are the truth: appending to them is what makes a token chosen, and a step runs what the cache lacks, which is
    the last of `kept_ids` or, after an exception, all of them.

    Attributes:
        request: What was asked for.
        ids: The prompt's, and those chosen so far. A few may not be yielded yet.
        engine: With the cache, from the first step on.
        begun: Whether it has that.
        kept: Which of `ids` are in the context.
        deadline: The time.monotonic() at which it ends; infinite where there is none.
        logprobs: Those of the tokens chosen so far, where they were asked for.
        prompt_logprobs: Those of the prompt's tokens, where they were asked for; None for the first.
        tokens_per_step: How many tokens a step of this row alone chooses, lately; drafts make it more than one.
        forced_tokens: How many were not chosen, since nothing else could follow.
    """

    def __init__(self, engine: Engine, request: Request, lifecycle: Lifecycle | None = None) -> None:
        """Leaves the engine alone until the first token is asked for.

        Args:
            engine: Which graph, and the cache unless the lifecycle provides another.
            request: What is asked for.
            lifecycle: What surrounds the steps; None for steps that it runs itself.

        Raises:
            InputError: The model cannot take the prompt, or an option is out of range.
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
        self.closed = False  # nobody asks for more
        self.drafted = False  # whether its last step alone had a draft
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
        self._ending: FinishReason | None = None if self._limit else "length"
        self._jumped = False  # whether what must follow the newest of `ids` is among them
        self._seen = 0  # of how many `ids` it is known whether the text ends with them
        self.tokens_per_step = 1.0
        self._resets = engine.resets

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
        """How many were yielded."""
        return self._yielded - self.prompt_tokens

    @property
    def kept_ids(self) -> list[int]:
        """Those of `ids` that are in the context."""
        return self.kept.of(self.ids)

    @property
    def ready(self) -> bool:
        """Whether the next token, or the end, can be told without a step."""
        return self._yielded < len(self.ids) or self.ended

    @property
    def ended(self) -> bool:
        """Whether no step follows."""
        return self.closed or self.error is not None or self._ending is not None or self._overdue()

    @property
    def most_tokens(self) -> int:
        """As many as the text may come to."""
        return self.prompt_tokens + self._limit

    @property
    def ahead(self) -> int:
        """How many tokens are chosen that nobody has asked for."""
        return len(self.ids) - self._yielded

    def cancel(self) -> None:
        """Ends it within one step, from any thread. Tokens that were yielded stay."""
        if self._ending is None:
            self._ending = "cancelled"

    def fail(self, error: BaseException) -> None:
        """Ends it with an error, which is raised where the next token is asked for."""
        self.error = error

    def close(self) -> None:
        """Ends it, and takes back what nobody asked for. Never waits."""
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

    # --- steps, by whoever drives -------------------------------------------------------------------------------------
    def begin(self) -> None:
        """Takes a cache, with what it shares with the prompt. Once, before the first step."""
        if self.begun:
            return
        self.engine, self.cached_tokens = self._lifecycle.provide(self)
        self._resets = self.engine.resets
        self.begun = True

    def restart(self) -> None:
        """Drops the cache after an exception within a step: the next step runs `ids` again."""
        if self.begun and self.engine.resets == self._resets:
            self.engine.drop_cache()
        if self._constraint is not None:
            self._constraint.restart()
        self._seen, self._jumped = 0, False

    @property
    def pending(self) -> int:
        """How many of `ids` the cache lacks: one when the next step is one of decoding."""
        count = len(self.ids) - self.kept.dropped
        return count - min(self.engine.length, count - 1) if self.begun else count

    def step(self, chunk_size: int | None = None) -> None:
        """One run of this row alone: a chunk of what the cache lacks, or the last token with a draft behind it."""
        engine = self.engine
        if not self._jumped:
            self.jump()
            if self.ended:
                return
        self._speculator.start()
        missing = self.kept.missing(self.ids, engine.length)
        if len(missing) == 1:
            self.kept.make_room(engine, 1)
            draft = self._speculator.draft(self.ids, self._room)
            try:
                logits = engine.run(np.array([[*missing, *draft]]), keep=1 + len(draft))
            except NumericsError:
                if not draft:
                    raise
                # Not finite keys or values of a draft token, which may be no part of the text, reach the rows before.
                draft = []
                self._speculator.stop()
                logits = engine.run(np.array([missing]))
            self.drafted, accepted = bool(draft), self.accepted_tokens
            self._count(self.take(logits[0], draft))
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
        self._speculator.read()
        if len(sizes) == 1:
            self.take(logits[None], [])
            self.jump()

    def _read_with_logprobs(self, ids: Sequence[int]) -> Logits:
        """Runs tokens of the prompt, and notes their log-probabilities. The last one's logits (V,)."""
        start = self.engine.length
        logits = self.engine.all_logits(ids)
        for place, row in enumerate(logits[: self.prompt_tokens - start - 1], start + 1):
            self.prompt_logprobs[place] = token_logprob(row, self.ids[place], self._top or 0)
        last: Logits = logits[-1]
        return last

    def _settle(self) -> None:
        """Forgets in the cache what is not of the text: rejected drafts, and what nobody asked for."""
        last = len(self.ids) - self.kept.dropped - (not self.ended)  # it is run for its logits
        if self.engine.length > last:
            self.engine.trim(last) if self.engine.can_trim(last) else self.engine.empty()

    def retire(self) -> None:
        """Takes back what nobody asked for, in `ids` and in the cache, when no step runs and none follows."""
        if self.begun and self.engine.resets != self._resets:  # another's engine
            return
        del self.ids[self._yielded :]
        if self.begun:
            self._settle()
        self._speculator.stop()
        self._lifecycle.retired(self)

    def take(self, logits: Logits, draft: Sequence[int]) -> int:
        """Chooses tokens by the logits (T, V), up to the first that rejects the draft's, and appends them to `ids`.

        Returns how many.
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
        """Prepares a step with other rows."""
        self.jump()
        self.kept.make_room(self.engine, 1)

    def jump(self) -> None:
        """Appends the tokens that must follow. The next step runs them at once, as it does a prompt's."""
        if self._jumped:
            return
        self._see_whether_it_ends()
        # Log-probabilities are those of single choices.
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
        """By its last token: where the constraint is met, or at the limit."""
        if self._seen == len(self.ids):
            return
        if self._constraint is not None:
            self._constraint.follow(self.ids, self.prompt_tokens)
            if self._constraint.complete:
                self._ending = self._ending or "stop"
        if len(self.ids) >= self.most_tokens:
            self._ending = self._ending or "length"
        self._seen = len(self.ids)

    def take_together(self, logits: Logits) -> None:
        """As `take` of a run of several rows, (1, V): there is no draft, and what one would have brought is counted."""
        self._speculator.guess(self.ids, self._room)
        token, chosen = self.ids[-1] if self.take(logits, []) else None, len(self.ids)
        self.jump()
        if tokens := self._speculator.came(token, more=len(self.ids) > chosen):
            self._count(tokens)

    def _count(self, tokens: int) -> None:
        self.tokens_per_step += _NEWEST * (tokens - self.tokens_per_step)

    @property
    def _room(self) -> int:
        """Draft tokens that the context and the limit leave room for."""
        room = self.engine.manifest.context_length - self.engine.length - 1
        return min(room, self.most_tokens - len(self.ids) - 1)

    def require_ownership(self) -> None:
        """Raises InputError where another generation took the engine over."""
        if self.begun and self.engine.resets != self._resets:
            raise InputError(
                "another generation began on this engine before this one ended: finish one before the next, or give "
                "each an engine of its own"
            )

"""Whether a draft model pays, and how many tokens to draft, by measured run times and acceptance.

With acceptance probability a, k draft tokens yield (1 - a^(k+1)) / (1 - a) tokens per step. The k with the most tokens
per second is used, which may be 0 (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023,
section 3.5).

A draft may cost time before it is known to pay. So rejected drafts have a time budget: SHARE of the time of all
requests, plus LOAN steps, plus the time that accepted drafts saved before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ..settings import MAX_DRAFT_TOKENS

SHARE = 0.014  # share of all time that rejected drafts may take
LOAN = 2.0  # steps that they may take in advance, in a request of at least LOAN / SHARE tokens
REFRESH = 64  # steps with drafts after which a step without one is measured again
_MARGIN = 1.03  # factor by which drafts must be faster
_FIRST_RATE = 0.8  # assumed acceptance rate before any observation
_PRIOR = 4.0  # weight of the rate of other requests in a new one, in draft tokens
_MEMORY = 0.95  # decay of earlier observations per draft token
_OTHERS = 0.05  # weight of the newest draft token in the rate of all requests
_PER_TOKEN = 0.2  # assumed cost of each further token of a run, relative to the first, until measured
_NEWEST = 0.2  # weight of the newest run in a moving average
_FIRST = 2  # first runs of one token, of which the faster one counts
_HELD_UP = 4  # a run counts at most so many times the average: the rest is due to other processes
_SHORT = 2  # largest run that counts as a single token
_LONG = 16  # smallest run that measures the time per prefill token


class Rate:
    """The recent acceptance rate of draft tokens in one request."""

    def __init__(self, first: float) -> None:
        self._accepted, self._drafted = _PRIOR * first, _PRIOR

    @property
    def value(self) -> float:
        """The rate, between 0 and 1."""
        return self._accepted / self._drafted

    def note(self, accepted: bool) -> None:
        """Records one draft token. Tokens behind a rejected one do not count."""
        self._accepted = _MEMORY * self._accepted + accepted
        self._drafted = _MEMORY * self._drafted + 1


class Worth:
    """Timings and acceptance of one model with its draft model, over all requests.

    Attributes:
        clock: Returns the time in seconds.
        rate: Acceptance rate of draft tokens over all requests.
        balance: Seconds that drafts have saved, plus their budget; negative if they lost time.
    """

    def __init__(
        self, run_seconds: float, token_seconds: float, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Initial estimates for the draft model: seconds of a run of one token, and per token of a prefill."""
        self.clock = clock
        self.rate = _FIRST_RATE
        self.balance = 0.0
        self._steps: dict[int, float] = {}  # seconds of a run, by its tokens
        self._timed = 0  # number of measured runs of one token
        self._draft, self._draft_reads = run_seconds, token_seconds
        self._last = 0.0  # seconds of the last step
        self._since_plain = 0  # steps since the last one without a draft
        self._since_try = 0.0  # seconds since the last draft

    def tokens(self, rate: float, behind: int, most: int) -> int:
        """Number of tokens worth drafting.

        Args:
            rate: Acceptance rate in this request.
            behind: Number of tokens that the draft model's cache lacks.
            most: Number of tokens that may still follow in this request.
        """
        if self._timed < _FIRST or self._since_plain >= REFRESH or most < 1:
            return 0
        step, draft = self._steps[1], self._draft
        lent = self.balance + min(LOAN, SHARE * most) * step
        if self._loss(1, behind) > lent:
            return 0
        best, fastest, brought = 0, _MARGIN / step, 1.0
        for count in range(1, min(most, MAX_DRAFT_TOKENS) + 1):
            brought += rate**count
            if (speed := brought / (count * draft + self._run(count + 1))) > fastest:
                best, fastest = count, speed
        if not best:  # probes whether drafts pay again, without spending what was saved
            best, lent = 1, min(lent, SHARE * self.rate * self._since_try)
        while best and self._loss(best, behind) > lent:
            best -= 1
        return best

    def note_drafting(self, runs: Sequence[tuple[int, float]]) -> None:
        """Records the draft model's runs for a step: (tokens, seconds) of each."""
        fastest = min((seconds for tokens, seconds in runs if tokens <= _SHORT), default=None)
        if fastest is not None:
            self._draft = _averaged(self._draft, fastest)
        for tokens, seconds in runs:
            if tokens >= _LONG:
                self._draft_reads = _averaged(self._draft_reads, seconds / tokens)
        draft = self._draft
        self.balance -= sum(min(seconds, max(_HELD_UP, tokens) * draft) for tokens, seconds in runs)
        self._since_try = 0.0

    def note_prefill(self, seconds: float) -> None:
        """Records the seconds of a prefill run."""
        self._since_try += seconds
        self.balance += SHARE * seconds

    def note_step(self, tokens: int, seconds: float) -> None:
        """Records the seconds of a run of `tokens`, including sampling."""
        if tokens == 1:
            before = self._steps.get(1, seconds)
            self._steps[1] = _averaged(before, seconds) if self._timed >= _FIRST else min(before, seconds)
            self._timed += 1
        elif 1 in self._steps:
            expected = self._run(tokens)
            self._steps[tokens] = _averaged(self._steps.get(tokens), min(seconds, 2 * expected))
        if 1 in self._steps:
            self._last = min(seconds, _HELD_UP * self._run(tokens))
        self._since_plain = 0 if tokens == 1 else self._since_plain + 1
        self._since_try += seconds
        self.balance += SHARE * seconds

    def note_draft(self, drafted: int, accepted: int) -> None:
        """Records the outcome of a draft after its step."""
        step = self._steps.get(1)
        if step is not None:
            self.balance += (accepted + 1) * step - self._last
        for place in range(observed(drafted, accepted)):
            self.rate += _OTHERS * ((place < accepted) - self.rate)

    def _run(self, tokens: int) -> float:
        """Seconds of a run of so many tokens, measured or estimated from shorter runs."""
        known = max(count for count in self._steps if count <= tokens)
        return self._steps[known] + (tokens - known) * _PER_TOKEN * self._steps[1]

    def _loss(self, count: int, behind: int) -> float:
        """Seconds lost if none of `count` draft tokens is accepted."""
        step, draft = self._steps[1], self._draft
        reading = self._draft_reads * max(0, behind - _SHORT)
        return reading + count * draft + self._run(count + 1) - step


def _averaged(before: float | None, newest: float) -> float:
    """A moving average that limits the weight of outliers."""
    return newest if before is None else before + _NEWEST * (min(newest, 2 * before) - before)


def observed(drafted: int, accepted: int) -> int:
    """Number of judged draft tokens, up to the first rejected one. An empty draft counts as 1: it predicts the end."""
    return max(1, min(drafted, accepted + 1))

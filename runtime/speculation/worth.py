"""Whether a draft model pays, and how many tokens it drafts: by what runs took here and what was accepted.

Where a token is accepted with probability a, k draft tokens bring (1 - a^(k+1)) / (1 - a) tokens a step; the k with the
most tokens a second is taken, 0 among them (Leviathan et al., "Fast Inference from Transformers via Speculative
Decoding", 2023, section 3.5).

A draft that does not pay costs time before that is known. So time is lent: what rejected drafts may cost is bounded by
SHARE of the time that all texts took, LOAN steps, and what accepted ones saved before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ..settings import MAX_DRAFT_TOKENS

SHARE = 0.014  # of all time, which rejected drafts may take
LOAN = 2.0  # steps that they may take before that, of a text of at least LOAN / SHARE tokens
REFRESH = 64  # steps with drafts after which one without them is timed anew
_MARGIN = 1.03  # by which drafts must be faster
_FIRST_RATE = 0.8  # of a draft token's acceptance, before any was seen
_PRIOR = 4.0  # draft tokens that the rate of other texts counts as, in a new one
_MEMORY = 0.95  # what is left of an observation after the next
_OTHERS = 0.05  # the weight of the newest draft token in the rate of all texts
_PER_TOKEN = 0.2  # what each further token of a run costs, as a share of the first, until it was timed
_NEWEST = 0.2  # the weight of the newest run in an average
_FIRST = 2  # runs of one token, of which the faster one counts
_HELD_UP = 4  # times an average: what a run takes beyond is not its own, but something else that held it up
_SHORT = 2  # tokens of a run that counts as one of a single token
_LONG = 16  # tokens of a run that tells what a token of a prefill takes


class Rate:
    """How often a draft token is accepted in one text, lately."""

    def __init__(self, first: float) -> None:
        self._accepted, self._drafted = _PRIOR * first, _PRIOR

    @property
    def value(self) -> float:
        """Between 0 and 1."""
        return self._accepted / self._drafted

    def note(self, accepted: bool) -> None:
        """Takes in one draft token. Those behind a rejected one tell nothing."""
        self._accepted = _MEMORY * self._accepted + accepted
        self._drafted = _MEMORY * self._drafted + 1


class Worth:
    """What is known of one model and its draft model, over all texts.

    Attributes:
        clock: Tells seconds.
        rate: How often a draft token is accepted, over all texts.
        balance: Seconds that drafts have saved, with what they were lent; below 0 what they have lost.
    """

    def __init__(
        self, run_seconds: float, token_seconds: float, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """What the draft model takes, as far as is known: for a run of one token, and for each token of a prompt."""
        self.clock = clock
        self.rate = _FIRST_RATE
        self.balance = 0.0
        self._steps: dict[int, float] = {}  # seconds of a run, by its tokens
        self._timed = 0  # runs of one token
        self._draft, self._draft_reads = run_seconds, token_seconds
        self._last = 0.0  # seconds of the last step
        self._since_plain = 0  # steps
        self._since_try = 0.0  # seconds

    def tokens(self, rate: float, behind: int, most: int) -> int:
        """How many tokens are worth drafting.

        Args:
            rate: Of acceptance, in this text.
            behind: How many tokens the draft model's cache lacks.
            most: How many tokens may still come in this text.
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
        if not best:  # the text may have become another, but what was saved is not spent on that
            best, lent = 1, min(lent, SHARE * self.rate * self._since_try)
        while best and self._loss(best, behind) > lent:
            best -= 1
        return best

    def note_drafting(self, runs: Sequence[tuple[int, float]]) -> None:
        """Takes in the draft model's runs for a step: how many tokens each read, and its seconds."""
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
        """Takes in what a run over a part of the prompt took."""
        self._since_try += seconds
        self.balance += SHARE * seconds

    def note_step(self, tokens: int, seconds: float) -> None:
        """Takes in what a run of so many tokens took, with the choice of what follows."""
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
        """Takes in what became of a draft, after its step."""
        step = self._steps.get(1)
        if step is not None:
            self.balance += (accepted + 1) * step - self._last
        for place in range(observed(drafted, accepted)):
            self.rate += _OTHERS * ((place < accepted) - self.rate)

    def _run(self, tokens: int) -> float:
        """Seconds of a run of so many tokens, or what they may be by those of fewer."""
        known = max(count for count in self._steps if count <= tokens)
        return self._steps[known] + (tokens - known) * _PER_TOKEN * self._steps[1]

    def _loss(self, count: int, behind: int) -> float:
        """Seconds that are lost where none of so many draft tokens is accepted."""
        step, draft = self._steps[1], self._draft
        reading = self._draft_reads * max(0, behind - _SHORT)
        return reading + count * draft + self._run(count + 1) - step


def _averaged(before: float | None, newest: float) -> float:
    """An average in which a run that something else held up counts little."""
    return newest if before is None else before + _NEWEST * (min(newest, 2 * before) - before)


def observed(drafted: int, accepted: int) -> int:
    """How many guesses were judged: up to the first rejected one. A draft of none is one, too: that nothing follows."""
    return max(1, min(drafted, accepted + 1))

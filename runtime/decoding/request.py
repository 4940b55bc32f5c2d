"""What one generation is asked for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from pastkey.errors import InputError
from pastkey.values import shown

from ..sampling.dry import Breakers
from ..settings import NUM_SINK_TOKENS, ContextOverflow, SamplingConfig, require_valid
from ..speculation.drafter import Drafter, Follows


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is continued.

    Attributes:
        prompt: Token ids (T,), at least one.
        max_new_tokens: At most so many.
        end_ids: EOS tokens.
        sampling: How a token is chosen.
        reuse_prefix: Whether what the engine's cache shares with the prompt is kept.
        prompt_lookup: Whether draft tokens are run where the text repeats itself.
        exact: Whether of a cache only what a prefill computed is kept.
        timeout: Seconds from the first step on, after which it ends.
        breakers: DRY's sequence breakers as ids.
        logprobs: Whether log-probabilities are kept, and of how many of the likeliest tokens beside the chosen one.
        prompt_logprobs: Whether those of the prompt's tokens are kept, of all that the cache does not have yet.
        context_overflow: Whether a text that is longer than the context is an error, or old tokens leave the cache.
        num_sink_tokens: How many of the first tokens never do.
        constraint: What the new tokens are held to.
        drafter: Drafts where `prompt_lookup` finds nothing.

    Raises InputError for a value out of range.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    end_ids: Collection[int] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reuse_prefix: bool = False
    prompt_lookup: bool = True
    exact: bool = False
    timeout: float | None = None
    breakers: Breakers | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    context_overflow: ContextOverflow = "error"
    num_sink_tokens: int = NUM_SINK_TOKENS
    constraint: Follows | None = None
    drafter: Drafter | None = None

    def __post_init__(self) -> None:
        require_valid(vars(self))
        most, least = self.max_new_tokens, self.sampling.min_new_tokens
        if least > most:
            raise InputError(f"min_new_tokens is {shown(least)}; it must be at most max_new_tokens, {shown(most)}")
        if len(self.prompt) == 0:
            raise InputError("the prompt is empty: give at least one token to continue from")

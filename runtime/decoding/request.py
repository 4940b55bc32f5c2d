"""The input of a Generation: a prompt and its options."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from pastkey.errors import InputError
from pastkey.values import shown

from ..constraints.matcher import Matcher
from ..options import NUM_SINK_TOKENS, ContextOverflow
from ..sampling.dry import Breakers
from ..settings import SamplingConfig
from ..speculation.drafter import Drafter


@dataclass(frozen=True)
class Request:
    """A prompt and its options.

    Attributes:
        prompt: Token ids (T,), at least one.
        max_new_tokens: Limit of new tokens.
        end_ids: EOS tokens.
        sampling: Settings of the sampler.
        reuse_prefix: Whether to reuse the prefix of the prompt that is in the KV cache.
        prompt_lookup: Whether to draft tokens from repetitions in the sequence.
        exact: Whether to reuse only cache entries that a prefill computed.
        timeout: Seconds from the first step to the end of the request.
        breakers: DRY's sequence breakers as ids.
        logprobs: Number of most likely tokens to log in addition to the sampled one; None for no log-probabilities.
        prompt_logprobs: Whether to log the prompt's tokens, those beyond the cached prefix.
        context_overflow: "error" for a sequence longer than the context, or "shift" to evict old tokens.
        num_sink_tokens: Number of first tokens that are never evicted.
        constraint: Restricts the new tokens.
        drafter: Drafts tokens when `prompt_lookup` finds none.

    Raises InputError for an empty prompt, and for more `min_new_tokens` than `max_new_tokens`.
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
    constraint: Matcher | None = None
    drafter: Drafter | None = None

    def __post_init__(self) -> None:
        most, least = self.max_new_tokens, self.sampling.min_new_tokens
        if least > most:
            raise InputError(
                f"min_new_tokens is {shown(least)}; it must be at most max_new_tokens, {shown(most)}",
                option="min_new_tokens",
            )
        if len(self.prompt) == 0:
            raise InputError("the prompt is empty: give at least one token to continue from")

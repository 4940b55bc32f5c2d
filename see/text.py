"""The text of the page: the prompt, continued by the runtime, and the sampler's stages at every position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pastkey.errors import InputError
from pastkey.export.measure.metrics import softmax
from pastkey.runtime import LanguageModel, SamplingConfig, SamplingOptions
from pastkey.runtime.sampling.sampler import Sampler

MOST_TOKENS = 2048  # of a text: a head's weights are as many numbers as tokens squared
EXAMPLE = SamplingOptions(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, seed=0)  # shown for a greedy text


@dataclass(frozen=True)
class Text:
    """A prompt and its continuation."""

    ids: list[int]  # (S,): the prompt and the new tokens that the model has read
    prompt_tokens: int
    following: int  # the last new token, which it has not read
    ended: bool  # whether that is the end token


@dataclass(frozen=True)
class SamplerStages:
    """The rest of a distribution after each stage of the sampler."""

    names: list[str]  # in order, from "all tokens" on
    kept: list[int]  # tokens with a probability, after each
    ids: npt.NDArray[np.int64]  # (K,), the likeliest tokens before all stages
    probabilities: npt.NDArray[np.float32]  # (stages, K)


def continued(lm: LanguageModel, prompt: str | Sequence[int], max_new_tokens: int, sampling: SamplingOptions) -> Text:
    """Continues a prompt by at least one token. Raises InputError as `generate` does, and for more than MOST_TOKENS."""
    ids = lm.prompt_ids(prompt)
    if min(len(ids) + max_new_tokens, lm.manifest.context_length) > MOST_TOKENS:
        raise InputError(
            f"the prompt has {len(ids)} tokens and {max_new_tokens} may follow; see looks inside {MOST_TOKENS} at "
            "most: shorten the prompt, or give a smaller --max-new-tokens"
        )
    completion = lm.generate(ids, max_new_tokens=max_new_tokens, **sampling)
    whole = [*ids, *completion.ids]
    ended = completion.finish_reason == "stop"
    if ended:
        ends = lm.manifest.eos_token_ids
        whole.append(ends[0] if len(ends) == 1 else max(ends, key=lm.logits(whole)[-1].__getitem__))
    return Text(whole[:-1], len(ids), whole[-1], ended)


def stages(
    text: Text, first: int, logits: npt.NDArray[np.float32], sampling: SamplingOptions, count: int
) -> Iterator[SamplerStages]:
    """Yields the stages of the runtime's sampler for each of the logits (W, V) after the tokens from `first` on."""
    sampler = Sampler(SamplingConfig.of(sampling), prompt_tokens=text.prompt_tokens, vocab_size=logits.shape[-1])
    for place, row in enumerate(logits):
        left = [("all tokens", row), *sampler.stages(row, text.ids[: first + place + 1])]
        with np.errstate(invalid="ignore"):
            chances = np.stack([softmax(scores.astype(np.float64)) for _, scores in left])
        ids = np.argsort(-row, kind="stable")[:count]
        kept = [int((scores > -np.inf).sum()) for _, scores in left]
        yield SamplerStages([name for name, _ in left], kept, ids, chances[:, ids].astype(np.float32))

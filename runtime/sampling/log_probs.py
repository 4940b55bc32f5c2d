"""Log-probabilities of the model's own distribution: the log-softmax of its float32 logits, before any setting."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class TokenLogprob:
    """The model's log-probability of a token, independent of the sampler's settings.

    Attributes:
        id: The token.
        logprob: The natural logarithm of its probability: log-softmax of the float32 logits, before any setting.
        top: The most likely tokens at this position and their log-probabilities, in descending order; ties by id.
    """

    id: int
    logprob: float
    top: list[tuple[int, float]]


def token_logprob(logits: npt.NDArray[np.float32], token: int, top: int = 0) -> TokenLogprob:
    """The log-probability of one token from logits (V,) float32, with those of the `top` most likely tokens."""
    largest = logits.max()
    # float32 exponentials summed in float64 are exact enough: log-probabilities differ by at most 1e-7.
    normalizer = float(largest) + float(np.log(np.exp(logits - largest).sum(dtype=np.float64)))
    return TokenLogprob(
        token, float(logits[token]) - normalizer, [(i, float(logits[i]) - normalizer) for i in likeliest(logits, top)]
    )


def likeliest(logits: npt.NDArray[np.floating], count: int) -> list[int]:
    """The ids of the `count` largest logits (V,), in descending order; ties by id."""
    if not count:
        return []
    count = min(count, logits.size)
    least = np.partition(logits, -count)[-count]
    candidates = np.flatnonzero(logits >= least)
    order = np.argsort(-logits[candidates], kind="stable")[:count]
    return [int(i) for i in candidates[order]]

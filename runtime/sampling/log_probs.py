"""Log-probabilities of the model's own distribution: the log-softmax of its float32 logits, before any setting."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was to the model, whatever the settings of the sampler.

    Attributes:
        id: The token.
        logprob: The natural logarithm of its probability: log-softmax of the float32 logits, before any setting.
        top: The most likely tokens there and their log-probabilities, the likeliest first; of equal ones the smaller
            id first.
    """

    id: int
    logprob: float
    top: list[tuple[int, float]]


def token_logprob(logits: npt.NDArray[np.float32], token: int, top: int = 0) -> TokenLogprob:
    """That of one token by logits (V,) float32, with those of the `top` likeliest ones."""
    largest = logits.max()
    # Exponentials of float32 are exact enough for a sum in float64: log-probabilities differ by 1e-7 at most.
    normalizer = float(largest) + float(np.log(np.exp(logits - largest).sum(dtype=np.float64)))
    return TokenLogprob(
        token, float(logits[token]) - normalizer, [(i, float(logits[i]) - normalizer) for i in likeliest(logits, top)]
    )


def likeliest(logits: npt.NDArray[np.floating], count: int) -> list[int]:
    """The ids of the `count` largest of logits (V,), in descending order, of equal ones the smaller id first."""
    if not count:
        return []
    count = min(count, logits.size)
    least = np.partition(logits, -count)[-count]
    candidates = np.flatnonzero(logits >= least)
    order = np.argsort(-logits[candidates], kind="stable")[:count]
    return [int(i) for i in candidates[order]]

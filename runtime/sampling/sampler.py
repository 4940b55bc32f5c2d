"""From logits to a token. Small pure functions: each takes an array and returns another, and writes into neither.

The order, stated once: repetition penalty, then (temperature 0) the largest logit, or temperature, top-k, top-p, min-p
and a draw. It is the order of Hugging Face's logits processors. Settings count as float32, as a graph takes them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..settings import SamplingConfig
from .random_stream import fresh_seed, uniform

Scores = npt.NDArray[np.floating]

_REAL = ("temperature", "top_p", "min_p", "repetition_penalty")


class Sampler:
    """Chooses one token after another by a SamplingConfig. It has no state: a draw goes by the seed and the place.

    Attributes:
        config: As given, with a seed where it had none, and with float32's nearest settings.
    """

    def __init__(self, config: SamplingConfig) -> None:
        nearest: dict[str, Any] = {name: float(np.float32(getattr(config, name))) for name in _REAL}
        self.config = dataclasses.replace(config, **nearest, seed=fresh_seed() if config.seed is None else config.seed)

    def __call__(self, logits: Scores, ids: Sequence[int]) -> int:
        """The next token's id. `logits` is (V,); `ids` are those of the prompt and of the text so far."""
        config = self.config
        assert config.seed is not None
        if config.repetition_penalty != 1:
            logits = apply_repetition_penalty(logits, ids, config.repetition_penalty)
        if config.temperature == 0:
            return int(np.argmax(logits))
        logits = apply_temperature(logits, config.temperature)
        if config.top_k:
            logits = keep_top_k(logits, config.top_k)
        if config.top_p < 1:
            logits = keep_top_p(logits, config.top_p)
        if config.min_p:
            logits = keep_min_p(logits, config.min_p)
        return draw(logits, uniform(config.seed, len(ids)))


def apply_repetition_penalty(logits: Scores, seen: Sequence[int], penalty: float) -> Scores:
    """Logits (V,) with those of the ids in `seen` divided by `penalty` where positive, multiplied where negative.

    In float64 and cut off at its largest number, so that no penalty yields infinity, whose difference from itself no
    temperature could divide.

    Keskar et al., "CTRL: A Conditional Transformer Language Model for Controllable Generation", 2019, section 4.1,
    with the sign taken into account as is usual since.
    """
    ids = np.unique(np.asarray(seen, np.int64))
    penalised = logits.astype(np.float64)
    of_seen, most = penalised[ids], np.finfo(np.float64).max
    with np.errstate(over="ignore"):
        penalised[ids] = np.where(of_seen > 0, of_seen / penalty, of_seen * penalty).clip(-most, most)
    return penalised


def apply_temperature(logits: Scores, temperature: float) -> Scores:
    """Logits (V,) relative to the largest, divided by `temperature`: below 1 the likely tokens gain.

    In float64 and from the largest logit down, so that no temperature above 0 overflows.
    """
    with np.errstate(over="ignore"):  # a token that far below the largest has probability 0
        scaled: npt.NDArray[np.float64] = (logits.astype(np.float64) - logits.max()) / temperature
    return scaled


def keep_top_k(logits: Scores, k: int) -> Scores:
    """Logits (V,) with all but the `k` largest at minus infinity. Ties with the k-th stay."""
    if k >= logits.size:
        return logits
    kth = np.partition(logits, -k)[-k]
    return np.where(logits >= kth, logits, -np.inf)


def keep_top_p(logits: Scores, p: float) -> Scores:
    """Logits (V,) with all but the fewest likeliest tokens that reach probability `p` at minus infinity.

    Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020. The likeliest token always stays.
    """
    probabilities = softmax(logits)
    # Tokens of less than (1 - p) / V have less than 1 - p together: the others reach p, and are few to sort.
    candidates = np.flatnonzero(probabilities >= (1 - p) / logits.size)
    order = candidates[np.argsort(-logits[candidates], kind="stable")]
    before = np.cumsum(np.append(0.0, probabilities[order]))[:-1]  # what the likelier ones have together
    kept = np.full_like(logits, -np.inf)
    keep = order[before < p]
    kept[keep] = logits[keep]
    return kept


def keep_min_p(logits: Scores, p: float) -> Scores:
    """Logits (V,) with tokens of less than `p` times the likeliest one's probability at minus infinity.

    Nguyen et al., "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs", 2024.
    """
    return np.where(logits >= logits.max() + math.log(p), logits, -np.inf)


def draw(logits: Scores, u: float) -> int:
    """The id that `u`, a uniform number in [0, 1), draws with the probabilities that `logits` (V,) stand for."""
    cumulative = np.cumsum(softmax(logits))
    # The sum is 1 but for rounding; divided by itself it is 1, which no draw reaches.
    return int(np.searchsorted(cumulative / cumulative[-1], u, side="right"))


def softmax(logits: Scores) -> npt.NDArray[np.float64]:
    """Probabilities along the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    probabilities: npt.NDArray[np.float64] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return probabilities

"""Temperature, truncation of the candidates, and the draw: functions of arrays (V,).

A removed token has a logit of minus infinity. Exponentials, sorting and sums skip removed tokens. Only the normalizing
sum covers all V in order, zeros included: numpy adds pairwise, so another order would change the last bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .penalties import IdArray, Scores

_SHARE_TO_SORT = 2.0**-8  # of the largest probability: selects few tokens, mostly enough for top_p
_COUNTS_TO_SORT = (256, 4096, 2**63)  # for typical_p, tried in turn
_PART = 64  # tokens per part in `_bound`


class Left(NamedTuple):
    """The remaining tokens and their probabilities in float64. `ids` is None if all tokens remain."""

    ids: IdArray | None
    probabilities: npt.NDArray[np.float64]

    def among(self, places: IdArray) -> IdArray:
        """The ids at `places` of `probabilities`."""
        return places if self.ids is None else self.ids[places]


def left(logits: Scores) -> Left:
    """The remaining tokens of logits (V,) and their probabilities."""
    kept = logits > -np.inf
    if kept.all():  # avoids large arrays: the allocator returns them to the system, and page faults cost more than sums
        ids, exponentials = None, _exponentials(logits)
        total = exponentials.sum()
    else:
        ids = np.flatnonzero(kept)
        exponentials = _exponentials(logits[ids])
        every = np.zeros(logits.size)
        every[ids] = exponentials
        total = every.sum()
    exponentials /= total
    return Left(ids, exponentials)


def softmax(logits: Scores) -> npt.NDArray[np.float64]:
    """Probabilities (V,) of logits (V,)."""
    ids, probabilities = left(logits)
    if ids is None:
        return probabilities
    every = np.zeros(logits.size)
    every[ids] = probabilities
    return every


def _exponentials(logits: Scores) -> npt.NDArray[np.float64]:
    shifted: npt.NDArray[np.float64] = np.subtract(logits, logits.max(), dtype=np.float64)
    return np.exp(shifted, out=shifted)


def keep(logits: Scores, ids: IdArray) -> Scores:
    """Logits (V,) with minus infinity at all but `ids`."""
    kept = np.full_like(logits, -np.inf)
    kept[ids] = logits[ids]
    return kept


def apply_temperature(logits: Scores, temperature: float) -> Scores:
    """Logits (V,) minus the largest, divided by `temperature`: below 1 likely tokens gain.

    Computed in float64 relative to the largest logit, so that no temperature above 0 overflows.
    """
    scaled: npt.NDArray[np.float64] = np.subtract(logits, logits.max(), dtype=np.float64)
    if temperature != 1:
        with np.errstate(over="ignore"):  # an overflow means probability 0
            scaled /= temperature
    return scaled


def keep_top_n_sigma(logits: Scores, n: float) -> Scores:
    """Logits (V,) with minus infinity at those more than `n` standard deviations below the largest.

    The deviation is that of the remaining tokens, as in llama.cpp. It is invariant to the temperature.

    Tang et al., "Top-n-sigma: Not All Logits Are You Need", 2024.
    """
    finite = logits[logits > -np.inf].astype(np.float64)
    with np.errstate(over="ignore"):  # an infinite deviation keeps all tokens
        deviation = float(np.std(finite))
    return keep(logits, np.flatnonzero(logits >= finite.max() - n * deviation))


def keep_top_k(logits: Scores, k: int) -> Scores:
    """Logits (V,) with minus infinity at all but the `k` largest. Ties with the k-th stay."""
    if k >= logits.size:
        return logits
    candidates = np.flatnonzero(logits >= _bound(logits, k))
    among = logits[candidates]
    kth = np.partition(among, -k)[-k]
    return keep(logits, candidates[among >= kth])


def _bound(values: Scores, k: int) -> float:
    """A lower bound of the `k` largest of values (N,), which mostly few others reach; k <= N.

    It is the k-th largest of the maxima of parts. Partitions all N only if there are fewer than k parts.
    """
    parts = values.size // _PART
    if k > parts:
        return float(np.partition(values, -k)[-k])
    largest = values[: parts * _PART].reshape(-1, parts).max(axis=0)  # strided parts, which numpy vectorizes
    return float(np.partition(largest, -k)[-k])


def keep_top_p(logits: Scores, p: float) -> Scores:
    """Logits (V,) with minus infinity at all but the fewest most likely tokens that reach probability `p` together.

    Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020. The most likely token always stays.
    """
    there = left(logits)
    probabilities = there.probabilities
    # Tokens below (1 - p) / V have less than 1 - p together, so the others reach p. Mostly fewer suffice.
    sufficient = (1 - p) / logits.size
    for least in (max(_SHARE_TO_SORT * probabilities.max(), sufficient), sufficient):
        candidates = np.flatnonzero(probabilities >= least)
        order = candidates[np.argsort(-logits[there.among(candidates)], kind="stable")]
        reached = np.cumsum(probabilities[order])
        if reached[-1] >= p:
            break
    before = np.append(0.0, reached[:-1])  # sum of the more likely tokens
    return keep(logits, there.among(order[before < p]))


def keep_min_p(logits: Scores, p: float) -> Scores:
    """Logits (V,) with minus infinity at tokens of less than `p` times the largest probability.

    Nguyen et al., "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs", 2024.
    """
    return keep(logits, np.flatnonzero(logits >= logits.max() + math.log(p)))


def keep_typical(logits: Scores, p: float) -> Scores:
    """Logits (V,) with minus infinity at all but the most typical tokens that reach probability `p` together.

    A token is typical if its -log(probability) is near the distribution's entropy. Ties with the last one stay, as in
    transformers.

    Meister et al., "Locally Typical Sampling", 2022.
    """
    there = left(logits)
    probabilities = there.probabilities
    with np.errstate(divide="ignore", invalid="ignore"):
        log_probs = np.log(probabilities)
        terms = probabilities * log_probs
    terms[probabilities == 0] = 0
    nearness = np.abs(log_probs - terms.sum(), out=log_probs)  # to the entropy
    np.negative(nearness, out=nearness)
    for count in _COUNTS_TO_SORT:  # mostly a few tokens reach p
        order = _largest(nearness, count)
        reached = np.cumsum(probabilities[order])
        if reached[-1] >= p or order.size == nearness.size:
            break
    end = min(int((reached < p).sum()), order.size - 1)
    return keep(logits, there.among(np.flatnonzero(nearness >= nearness[order[end]])))


def _largest(values: npt.NDArray[np.float64], count: int) -> IdArray:
    """The indices of at least the `count` largest numbers, descending, including ties with the last one."""
    candidates = np.arange(values.size)
    if count < values.size:
        candidates = np.flatnonzero(values >= _bound(values, count))
    return candidates[np.argsort(-values[candidates], kind="stable")]


def exclude_top_choices(logits: Scores, threshold: float) -> Scores:
    """Logits (V,) with minus infinity at all tokens of at least probability `threshold`, except the least likely one.

    Of equally likely ones, that with the largest id stays. As llama.cpp's XTC, "Exclude Top Choices", P. E. Weidmann,
    2024, once it applies.
    """
    there = left(logits)
    probabilities = there.probabilities
    above = np.flatnonzero(probabilities >= threshold)
    if above.size < 2:
        return logits
    of_above = probabilities[above]
    last = above[np.flatnonzero(of_above == of_above.min())[-1]]
    kept = logits.copy()
    kept[there.among(above[above != last])] = -np.inf
    return kept


def draw(logits: Scores, u: float) -> int:
    """The id that `u`, a uniform number in [0, 1), draws from the probabilities of `logits` (V,)."""
    there = left(logits)
    sums = np.cumsum(there.probabilities, out=there.probabilities)
    # The total is 1 up to rounding; sums / total ends in exactly 1, which no draw reaches. Division keeps the order, so
    # the search with u * total lands near the index, and only few quotients are computed.
    total, place = sums[-1], int(np.searchsorted(sums, u * sums[-1], side="right"))
    while place and sums[place - 1] / total > u:
        place -= 1
    while sums[place] / total <= u:
        place += 1
    return int(there.among(np.array([place]))[0])

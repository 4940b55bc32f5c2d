"""From logits to probabilities and a draw: what is kept of the likely tokens. Functions of arrays (V,).

A token that is left out has a logit of minus infinity, and costs nothing from there on: exponentials, sorting and sums
are of those that are left. The sum that divides is of all V in their order, zeros included, as it always was: numpy
adds in pairs, so that another order would change the last bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .penalties import IdArray, Scores

_SHARE_TO_SORT = 2.0**-8  # of the likeliest one's probability: mostly enough tokens for top_p, and few
_COUNTS_TO_SORT = (256, 4096, 2**63)  # for typical_p, in turn
_PART = 64  # tokens, whose largest is found together


class Left(NamedTuple):
    """The tokens that are left, by id, and their probabilities in float64. `ids` is None where all are."""

    ids: IdArray | None
    probabilities: npt.NDArray[np.float64]

    def among(self, places: IdArray) -> IdArray:
        """The ids at some places among them."""
        return places if self.ids is None else self.ids[places]


def left(logits: Scores) -> Left:
    """What logits (V,) stand for."""
    kept = logits > -np.inf
    if kept.all():  # few large arrays: the allocator gives those back to the system, and pages cost more than sums
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
    """Logits (V,) with all but those of `ids` at minus infinity."""
    kept = np.full_like(logits, -np.inf)
    kept[ids] = logits[ids]
    return kept


def apply_temperature(logits: Scores, temperature: float) -> Scores:
    """Logits (V,) relative to the largest, divided by `temperature`: below 1 the likely tokens gain.

    In float64 and from the largest logit down, so that no temperature above 0 overflows.
    """
    scaled: npt.NDArray[np.float64] = np.subtract(logits, logits.max(), dtype=np.float64)
    if temperature != 1:
        with np.errstate(over="ignore"):  # a token that far below the largest has probability 0
            scaled /= temperature
    return scaled


def keep_top_n_sigma(logits: Scores, n: float) -> Scores:
    """Logits (V,) with those of more than `n` standard deviations below the largest at minus infinity.

    The deviation is that of the tokens that are left, as in llama.cpp; a temperature before it changes nothing.

    Tang et al., "Top-n-sigma: Not All Logits Are You Need", 2024.
    """
    finite = logits[logits > -np.inf].astype(np.float64)
    with np.errstate(over="ignore"):  # an infinite one keeps all
        deviation = float(np.std(finite))
    return keep(logits, np.flatnonzero(logits >= finite.max() - n * deviation))


def keep_top_k(logits: Scores, k: int) -> Scores:
    """Logits (V,) with all but the `k` largest at minus infinity. Ties with the k-th stay."""
    if k >= logits.size:
        return logits
    candidates = np.flatnonzero(logits >= _bound(logits, k))
    among = logits[candidates]
    kth = np.partition(among, -k)[-k]
    return keep(logits, candidates[among >= kth])


def _bound(values: Scores, k: int) -> float:
    """A number that at least the `k` largest of values (N,) reach, and mostly few others; k <= N.

    It is the k-th largest of the parts' largest ones: N are partitioned only where there are fewer parts.
    """
    parts = values.size // _PART
    if k > parts:
        return float(np.partition(values, -k)[-k])
    largest = values[: parts * _PART].reshape(-1, parts).max(axis=0)  # a stride apart, which numpy does by vectors
    return float(np.partition(largest, -k)[-k])


def keep_top_p(logits: Scores, p: float) -> Scores:
    """Logits (V,) with all but the fewest likeliest tokens that reach probability `p` at minus infinity.

    Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020. The likeliest token always stays.
    """
    there = left(logits)
    probabilities = there.probabilities
    # Tokens of less than (1 - p) / V have less than 1 - p together: the others reach p. Mostly fewer do.
    sufficient = (1 - p) / logits.size
    for least in (max(_SHARE_TO_SORT * probabilities.max(), sufficient), sufficient):
        candidates = np.flatnonzero(probabilities >= least)
        order = candidates[np.argsort(-logits[there.among(candidates)], kind="stable")]
        reached = np.cumsum(probabilities[order])
        if reached[-1] >= p:
            break
    before = np.append(0.0, reached[:-1])  # what the likelier ones have together
    return keep(logits, there.among(order[before < p]))


def keep_min_p(logits: Scores, p: float) -> Scores:
    """Logits (V,) with tokens of less than `p` times the likeliest one's probability at minus infinity.

    Nguyen et al., "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs", 2024.
    """
    return keep(logits, np.flatnonzero(logits >= logits.max() + math.log(p)))


def keep_typical(logits: Scores, p: float) -> Scores:
    """Logits (V,) with all but the most typical tokens that reach probability `p` at minus infinity.

    Typical is a token whose -log(probability) is near the distribution's entropy. Ties with the last one stay, as in
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
    for count in _COUNTS_TO_SORT:  # mostly a few reach it
        order = _largest(nearness, count)
        reached = np.cumsum(probabilities[order])
        if reached[-1] >= p or order.size == nearness.size:
            break
    end = min(int((reached < p).sum()), order.size - 1)
    return keep(logits, there.among(np.flatnonzero(nearness >= nearness[order[end]])))


def _largest(values: npt.NDArray[np.float64], count: int) -> IdArray:
    """The places of at least the `count` largest numbers, descending, with all that equal the last one."""
    candidates = np.arange(values.size)
    if count < values.size:
        candidates = np.flatnonzero(values >= _bound(values, count))
    return candidates[np.argsort(-values[candidates], kind="stable")]


def exclude_top_choices(logits: Scores, threshold: float) -> Scores:
    """Logits (V,) with all tokens of at least `threshold`'s probability at minus infinity, but the last of them.

    The last is the least likely one, of equal ones that of the largest id. As llama.cpp's XTC, "Exclude Top Choices",
    P. E. Weidmann, 2024, where it applies.
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
    """The id that `u`, a uniform number in [0, 1), draws with the probabilities that `logits` (V,) stand for."""
    there = left(logits)
    sums = np.cumsum(there.probabilities, out=there.probabilities)
    # The sum is 1 but for rounding; divided by itself it is 1, which no draw reaches. Division keeps the order, so that
    # the place is near that of the product, and few of the quotients are needed.
    total, place = sums[-1], int(np.searchsorted(sums, u * sums[-1], side="right"))
    while place and sums[place - 1] / total > u:
        place -= 1
    while sums[place] / total <= u:
        place += 1
    return int(there.among(np.array([place]))[0])

"""The token of `sampler`'s stages in a fraction of their time, or None where those must decide.

The stages compute in float64 over all V. Here float32 does that, and float64 only for the candidates and for the ids
that biases and penalties touch. A sum of float32 has an error below _DOUBT. Where the random number, or `top_p`, is so
near to a boundary between two tokens, the result is None. So a seed draws the same text.

Covers biases, the penalties, temperature, top_k, top_p and min_p. Other stages take the long way.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..settings import SamplingConfig
from . import bans, penalties
from .penalties import IdArray
from .truncation import SHARE_TO_SORT, lower_bound

_PART = 256  # tokens with a sum of their own
# Twice the relative error of a sum. Arguments of exp are exact to 1.8e-7 of their size, and sizes weighted by
# probability are at most ln V on average, which makes 2.3e-6; exp adds 0.3e-6, the sum of a part 1.2e-6.
_DOUBT = 1e-5
_DOUBT_OF_FEW = 1e-9  # the same of sums in float64
_LEAST_TEMPERATURE = 1e-3  # below, and for larger logits, float32 could overflow
_MOST_LOGIT = 1e6

_STAGES = frozenset(("logit_bias", "repetition_penalty", "presence_penalty", "top_k", "top_p", "min_p"))

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]


class Scores(NamedTuple):
    """Logits after biases and penalties. The others are the model's, and exact in float32."""

    others: Float32s  # (V,), minus infinity at `touched`
    touched: IdArray  # (N,), ascending
    values: Float64s  # (N,)
    largest: float
    token: int  # the first of the largest


def covers(config: SamplingConfig, stages: Collection[str]) -> bool:
    """Whether a config is covered, with the stages, except XTC, that its settings turn on."""
    return _STAGES.issuperset(stages) and (not config.temperature or config.temperature >= _LEAST_TEMPERATURE)


class Quick:
    """Chooses tokens by a config that `covers` accepts. Not thread-safe: it holds intermediate results."""

    def __init__(self, config: SamplingConfig) -> None:
        self._config = config
        self._bias = config.logit_bias or {}
        self._penalizes = config.repetition_penalty != 1 or config.presence_penalty or config.frequency_penalty
        self._others = self._x = np.empty(0, np.float32)

    def scores(self, logits: Float32s, text: IdArray | None) -> Scores:
        """Logits (V,) after biases and penalties for the ids of the text (T,), which None of them need."""
        c, none = self._config, np.empty(0, np.int64)
        recent = penalties.last(text, c.penalty_last_n) if self._penalizes and text is not None else none
        if not self._bias and not recent.size:
            token = int(logits.argmax())
            return Scores(logits, none, np.empty(0), float(logits[token]), token)
        every = np.concatenate([recent, np.fromiter(self._bias, np.int64, len(self._bias))]) if self._bias else recent
        touched, places = np.unique(every, return_inverse=True)
        values = logits[touched]
        if self._bias:
            values = bans.add_bias(values, dict(zip(places[recent.size :].tolist(), self._bias.values(), strict=True)))
        places = places[: recent.size]
        if c.repetition_penalty != 1:
            values = penalties.apply_repetition_penalty(values, places, c.repetition_penalty)
        if c.presence_penalty or c.frequency_penalty:
            values = penalties.apply_presence_and_frequency_penalty(
                values, places, c.presence_penalty, c.frequency_penalty
            )
        if self._others.size != logits.size:
            self._others = np.empty(logits.size, np.float32)
        others = self._others
        np.copyto(others, logits)
        others[touched] = -np.inf
        token, place = int(others.argmax()), int(values.argmax())
        largest, other = float(others[token]), float(values[place])
        if other > largest or (other == largest and touched[place] < token):
            largest, token = other, int(touched[place])
        return Scores(others, touched, values, largest, token)

    def draw(self, scores: Scores, u: float) -> int | None:
        """The id that `u` draws, or None."""
        with np.errstate(over="ignore"):  # an overflow means probability 0
            return self._draw(scores, u)

    def _draw(self, scores: Scores, u: float) -> int | None:
        c = self._config
        if not -_MOST_LOGIT < scores.largest < _MOST_LOGIT:
            return None
        if c.top_k:
            found = self._most_likely(scores, c.top_k)
        elif c.top_p < 1:
            return self._draw_of_top_p(scores, u)
        elif c.min_p:
            found = self._candidates(scores, scores.largest + c.temperature * math.log(c.min_p))
        else:
            return self._draw_of_all(scores, u)
        if found is None:
            return None
        ids, distances = found
        if c.top_p < 1:
            exponentials = np.exp(distances)
            kept = _first(distances, exponentials, float(exponentials.sum()), c.top_p, _DOUBT_OF_FEW)
            if kept is None:
                return None
            ids, distances = ids[kept], distances[kept]
        return self._draw_of_few(ids, distances, u)

    def _candidates(self, scores: Scores, least: float) -> tuple[IdArray, Float64s]:
        """The ids, ascending, of logits of at least `least` and a few below, and their distances from the largest.

        Distances are divided by the temperature.
        """
        below = np.float32(least - 1e-6 * (abs(least) + abs(scores.largest)))
        ids = np.flatnonzero(scores.others >= below)
        values = scores.others[ids].astype(np.float64)
        if scores.touched.size:
            there = np.flatnonzero(scores.values >= below)
            ids = np.concatenate([ids, scores.touched[there]])
            order = np.argsort(ids, kind="stable")
            ids, values = ids[order], np.concatenate([values, scores.values[there]])[order]
        return ids, self._distances(values, scores.largest)

    def _distances(self, values: Float64s, largest: float) -> Float64s:
        values -= largest
        if self._config.temperature != 1:
            values /= self._config.temperature
        return values

    def _most_likely(self, scores: Scores, k: int) -> tuple[IdArray, Float64s] | None:
        """The k largest, and those equal to the k-th."""
        bound = lower_bound(scores.others, k) if k < scores.others.size else -math.inf
        if bound == -math.inf:
            return None
        ids, distances = self._candidates(scores, bound)
        among = distances >= np.partition(distances, -k)[-k]
        return ids[among], distances[among]

    def _exponentials(self, scores: Scores) -> tuple[Float32s, np.float32]:
        """About exp((others - base) / temperature), (V,) and zeros up to a multiple of _PART; and the base."""
        size = scores.others.size
        if self._x.size < size:
            self._x = np.zeros(-(-size // _PART) * _PART, np.float32)
        base = np.float32(scores.largest)
        x = self._x[:size]
        np.subtract(scores.others, base, out=x)
        np.multiply(x, np.float32(1 / self._config.temperature), out=x)
        np.exp(x, out=x)
        return self._x, base

    def _draw_of_top_p(self, scores: Scores, u: float) -> int | None:
        c, size = self._config, scores.others.size
        exponentials, base = self._exponentials(scores)
        total = float(exponentials.reshape(-1, _PART).sum(axis=1).sum(dtype=np.float64))
        total *= math.exp((float(base) - scores.largest) / c.temperature)
        if scores.touched.size:
            total += float(np.exp(self._distances(scores.values.copy(), scores.largest)).sum())
        sufficient = (1 - c.top_p) / size * total
        for share in (max(SHARE_TO_SORT, sufficient), sufficient):
            ids, distances = self._candidates(scores, scores.largest + c.temperature * math.log(share))
            kept = _first(distances, np.exp(distances), total, c.top_p, _DOUBT)
            if kept is not None:
                return self._draw_of_few(ids[kept], distances[kept], u)
        return None

    def _draw_of_few(self, ids: IdArray, distances: Float64s, u: float) -> int | None:
        """Draws among ids, ascending, that top_k and top_p leave, by their distances from the largest."""
        exponentials = np.exp(distances)
        if self._config.min_p:
            exponentials[distances < math.log(self._config.min_p)] = 0
        place = _place(np.cumsum(exponentials), u, _DOUBT_OF_FEW)
        return None if place is None else int(ids[place])

    def _draw_of_all(self, scores: Scores, u: float) -> int | None:
        """Draws among all: first a part by the sums, then a token in it."""
        temperature, touched = self._config.temperature, scores.touched
        exponentials, base = self._exponentials(scores)
        sums = exponentials.reshape(-1, _PART).sum(axis=1).astype(np.float64)
        if touched.size:
            sums += np.bincount(touched // _PART, np.exp((scores.values - base) / temperature), sums.size)
        sums = np.cumsum(sums)
        number = u * float(sums[-1])
        part = int(np.searchsorted(sums, number, side="right"))
        if part == sums.size:
            return None
        start, end = part * _PART, min((part + 1) * _PART, scores.others.size)
        values = scores.others[start:end].astype(np.float64)
        if touched.size:
            first, last = np.searchsorted(touched, (start, end))
            values[touched[first:last] - start] = scores.values[first:last]
        within = np.exp((values - base) / temperature)
        within[0] += sums[part - 1] if part else 0
        place = _between(np.cumsum(within), number, _DOUBT * float(sums[-1]))
        return None if place is None else start + place


def _place(sums: Float64s, u: float, doubt: float) -> int | None:
    total = float(sums[-1])
    return _between(sums, u * total, doubt * total)


def _between(sums: Float64s, number: float, margin: float) -> int | None:
    """The place of the first of growing sums above `number`, or None where one is as near as `margin`."""
    place = int(np.searchsorted(sums, number, side="right"))
    near = place == sums.size or sums[place] - number <= margin or (place and number - sums[place - 1] <= margin)
    return None if near else place


def _first(distances: Float64s, exponentials: Float64s, total: float, p: float, doubt: float) -> IdArray | None:
    """The places, ascending, of the fewest largest that together reach p of the total; None if they do not."""
    order = np.argsort(-distances, kind="stable")
    place = _between(np.cumsum(exponentials[order]), p * total, doubt * total)
    return None if place is None else np.sort(order[: place + 1])

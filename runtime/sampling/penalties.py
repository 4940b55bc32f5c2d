"""Repetition, presence and frequency penalties.

Each function reads logits (V,) and ids, and returns logits (V,) in float64. Minus infinity stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.floating]
IdArray = npt.NDArray[np.int64]

_MOST = float(np.finfo(np.float64).max)


def last(seen: Sequence[int] | IdArray, count: int) -> IdArray:
    """The last `count` ids of `seen` (T,), or all for -1."""
    ids = np.asarray(seen, np.int64)
    return ids if count < 0 else ids[max(0, ids.size - count) :]


def apply_repetition_penalty(logits: Scores, seen: Sequence[int] | IdArray, penalty: float) -> Scores:
    """Logits (V,) with those of the ids in `seen` divided by `penalty` where positive, multiplied where negative.

    Computed in float64 and clipped to its largest number: the temperature subtracts the largest logit, and infinity
    minus infinity is NaN.

    Keskar et al., "CTRL: A Conditional Transformer Language Model for Controllable Generation", 2019, section 4.1,
    with the sign considered, as is usual since.
    """
    ids = np.asarray(seen, np.int64)
    penalised = logits.astype(np.float64)
    of_seen = penalised[ids]
    with np.errstate(over="ignore"):
        changed = np.where(of_seen > 0, of_seen / penalty, of_seen * penalty).clip(-_MOST, _MOST)
    penalised[ids] = np.where(of_seen == -np.inf, of_seen, changed)  # a repeated id gets the same value
    return penalised


def apply_presence_and_frequency_penalty(
    logits: Scores, seen: Sequence[int] | IdArray, presence: float, frequency: float
) -> Scores:
    """Logits (V,) minus `presence` for each id in `seen` and `frequency` for each of its occurrences.

    As llama.cpp and OpenAI's API define them. Negative values make tokens more likely.
    """
    ids, counts = np.unique(np.asarray(seen, np.int64), return_counts=True)
    penalised = logits.astype(np.float64)
    penalised[ids] -= counts * float(frequency) + float(presence)  # a Python int may exceed int64
    return penalised


def ban_repeated_ngrams(logits: Scores, seen: Sequence[int] | IdArray, size: int) -> Scores:
    """Logits (V,) with minus infinity at each id that would complete an n-gram of `size` ids that `seen` contains.

    As transformers' no_repeat_ngram_size. Paulus et al., "A Deep Reinforced Model for Abstractive Summarization", 2017.
    """
    ids = np.asarray(seen, np.int64)
    begins = ids.size - size + 1
    if begins <= 0:
        return logits
    same = np.ones(begins, bool)
    for place in range(size - 1):
        same &= ids[place : place + begins] == ids[ids.size - size + 1 + place]
    banned = logits.copy()
    banned[ids[size - 1 :][same]] = -np.inf
    return banned

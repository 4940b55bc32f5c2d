"""Less likely, for what the text has already. Each takes logits (V,) and ids, and gives other logits (V,) in float64.

What is at minus infinity stays there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.floating]
IdArray = npt.NDArray[np.int64]

_MOST = float(np.finfo(np.float64).max)


def last(seen: Sequence[int] | IdArray, count: int) -> IdArray:
    """The last `count` of ids (T,), or all for -1."""
    ids = np.asarray(seen, np.int64)
    return ids if count < 0 else ids[max(0, ids.size - count) :]


def apply_repetition_penalty(logits: Scores, seen: Sequence[int] | IdArray, penalty: float) -> Scores:
    """Logits (V,) with those of the ids in `seen` divided by `penalty` where positive, multiplied where negative.

    In float64 and cut off at its largest number, so that no penalty yields infinity, whose difference from itself no
    temperature could divide.

    Keskar et al., "CTRL: A Conditional Transformer Language Model for Controllable Generation", 2019, section 4.1,
    with the sign taken into account as is usual since.
    """
    ids = np.asarray(seen, np.int64)
    penalised = logits.astype(np.float64)
    of_seen = penalised[ids]
    with np.errstate(over="ignore"):
        changed = np.where(of_seen > 0, of_seen / penalty, of_seen * penalty).clip(-_MOST, _MOST)
    penalised[ids] = np.where(of_seen == -np.inf, of_seen, changed)  # the same for an id that is there twice
    return penalised


def apply_presence_and_frequency_penalty(
    logits: Scores, seen: Sequence[int] | IdArray, presence: float, frequency: float
) -> Scores:
    """Logits (V,) less `presence` for each id in `seen`, and less `frequency` for each time that it is there.

    As llama.cpp and OpenAI's API define them; below 0 they make tokens likelier.
    """
    ids, counts = np.unique(np.asarray(seen, np.int64), return_counts=True)
    penalised = logits.astype(np.float64)
    penalised[ids] -= counts * float(frequency) + float(presence)  # an int of Python may fit no int64
    return penalised


def ban_repeated_ngrams(logits: Scores, seen: Sequence[int] | IdArray, size: int) -> Scores:
    """Logits (V,) with each id at minus infinity that would end a sequence of `size` ids which `seen` has already.

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

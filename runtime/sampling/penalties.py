"""Less likely, for what the text has already. Each takes logits (V,) and ids, and gives other logits (V,) in float64.

What is at minus infinity stays there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.floating]
IdArray = npt.NDArray[np.int64]

_MOST = float(np.finfo(np.float64).max)
_LARGEST_EXPONENT = 88.7228391  # of e in float32, where llama.cpp cuts the penalty off


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
    penalised[ids] -= counts * frequency + presence
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


# --- DRY ----------------------------------------------------------------------------------------------------------
Breakers = Mapping[int, Collection[tuple[int, ...]]]  # a sequence breaker's first id -> those that follow it


def apply_dry(
    logits: Scores,
    seen: Sequence[int] | IdArray,
    multiplier: float,
    base: float = 1.75,
    allowed_length: int = 2,
    breakers: Breakers | None = None,
) -> Scores:
    """Logits (V,) less `multiplier` * `base` ** (n - `allowed_length`) for each id that would prolong a repetition.

    n is how many of the last ids of `seen` stood before that id at an earlier place, at the most; from
    `allowed_length` on it counts. It does not reach beyond the last breaker, and an id that breaks alone is spared. As
    llama.cpp defines it, after "DRY: A modern repetition penalty that reliably prevents looping", P. E. Weidmann, 2024.
    """
    ids, breakers = np.asarray(seen, np.int64), breakers or {}
    most = _since_break(ids, breakers)
    if ids.size <= allowed_length or most < allowed_length:
        return logits
    longest = _longest_repetitions(ids, allowed_length, _most_that_counts(most, base, allowed_length))
    alone = {head for head, tails in breakers.items() if () in tails}
    repeated = [(token, length) for token, length in longest.items() if token not in alone]
    if not repeated:
        return logits
    tokens, lengths = map(list, zip(*repeated, strict=True))
    penalised = logits.astype(np.float64)
    penalised[tokens] -= multiplier * base ** (np.array(lengths, np.float64) - allowed_length)
    return penalised


def _since_break(ids: IdArray, breakers: Breakers) -> int:
    """How many ids stand behind the last breaker."""
    if breakers:
        for place in np.flatnonzero(np.isin(ids, list(breakers)))[::-1].tolist():
            tails = [tuple(tail) for tail in breakers[int(ids[place])]]
            lengths = [len(tail) for tail in tails if tuple(ids[place + 1 : place + 1 + len(tail)].tolist()) == tail]
            if lengths:
                return int(ids.size) - place - 1 - max(lengths)
    return int(ids.size)


def _most_that_counts(most: int, base: float, allowed_length: int) -> int:
    """The length above which the penalty grows no more."""
    if base <= 1.000001:
        return most
    return min(most, allowed_length + int(_LARGEST_EXPONENT / np.log(base)))


def _longest_repetitions(ids: IdArray, least: int, most: int) -> dict[int, int]:
    """For each id that follows a repetition of the end of `ids`, its greatest length from `least` to `most`."""
    reverse = ids[::-1]
    places, length = np.arange(1, ids.size), 0  # how many ids from the end the repetition ends
    longest: dict[int, int] = {}
    while places.size:
        if length >= least:
            longest.update(dict.fromkeys(reverse[places - 1].tolist(), length))
        if length == most:
            break
        places = places[places + length < ids.size]
        places = places[reverse[places + length] == reverse[length]]
        length += 1
    return longest

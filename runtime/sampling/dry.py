"""DRY, "don't repeat yourself": penalises tokens that would prolong a repetition, as llama.cpp defines it.

DRY: A modern repetition penalty that reliably prevents looping, P. E. Weidmann, 2024,
https://github.com/oobabooga/text-generation-webui/pull/5677
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from .penalties import IdArray, Scores

_LARGEST_EXPONENT = 88.7228391  # of e in float32, where llama.cpp caps the penalty
_LONGEST_TEXT, _LONGEST_TAIL = 40, 20  # of a breaker: characters, and ids after the first, as in llama.cpp

Breakers = Mapping[int, Collection[tuple[int, ...]]]  # first id of a sequence breaker -> its possible other ids


def apply_dry(
    logits: Scores,
    seen: Sequence[int] | IdArray,
    multiplier: float,
    base: float = 1.75,
    allowed_length: int = 2,
    breakers: Breakers | None = None,
) -> Scores:
    """Logits (V,) minus `multiplier` * `base` ** (n - `allowed_length`) for each id that would prolong a repetition.

    n is the length of the longest suffix of `seen` that also precedes an earlier occurrence of the id; it counts from
    `allowed_length` on. A suffix ends at the last breaker. An id that is a breaker by itself gets no penalty.
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
    penalised[tokens] -= float(multiplier) * float(base) ** (np.array(lengths, np.float64) - allowed_length)
    return penalised


def _since_break(ids: IdArray, breakers: Breakers) -> int:
    """Number of ids after the last breaker."""
    if breakers:
        for place in np.flatnonzero(np.isin(ids, list(breakers)))[::-1].tolist():
            tails = [tuple(tail) for tail in breakers[int(ids[place])]]
            lengths = [len(tail) for tail in tails if tuple(ids[place + 1 : place + 1 + len(tail)].tolist()) == tail]
            if lengths:
                return len(ids) - int(place) - 1 - max(lengths)
    return len(ids)


def _most_that_counts(most: int, base: float, allowed_length: int) -> int:
    """The length at which the penalty stops growing."""
    if base <= 1.000001:  # the penalty hardly grows
        return most
    return min(most, allowed_length + math.floor(_LARGEST_EXPONENT / math.log(base)))


def _longest_repetitions(ids: IdArray, least: int, most: int) -> dict[int, int]:
    """Each id that follows an earlier repetition of the end of `ids` -> its largest length, from `least` to `most`."""
    reverse = ids[::-1]
    places, length = np.arange(1, ids.size), 0  # distance of the repetition's end from the end of `ids`
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


def sequence_breakers(
    given: Collection[str | Sequence[int]], pieces: Sequence[str], encode: Callable[[str], Sequence[int]]
) -> Breakers:
    """The ids of sequence breakers, given as texts or as ids.

    A token that contains the text is a breaker by itself. A token that ends with a prefix of the text is a breaker
    together with the tokens of the rest.

    Args:
        given: The breakers.
        pieces: The text of each token by id.
        encode: Encodes a text without special tokens.
    """
    found: dict[int, set[tuple[int, ...]]] = {}
    for breaker in given:
        if not isinstance(breaker, str):
            head, *tail = map(int, breaker)
            found.setdefault(head, set()).add(tuple(tail))
            continue
        text = breaker[:_LONGEST_TEXT]
        rests: dict[int, tuple[int, ...]] = {}
        for token, piece in enumerate(pieces):
            if text in piece:
                found.setdefault(token, set()).add(())
                continue
            for length in range(min(len(text) - 1, len(piece)), 0, -1):
                if piece.endswith(text[:length]):
                    if length not in rests:
                        rests[length] = tuple(encode(text[length:]))[:_LONGEST_TAIL]
                    found.setdefault(token, set()).add(rests[length])
    return found

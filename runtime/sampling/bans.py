"""What a caller asks of single tokens: a bias, a ban, one that must come. Each takes logits (V,) and gives others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from .penalties import IdArray, Scores

BadWords = Mapping[tuple[int, ...], Sequence[int]]  # what stands before -> the ids that would end a bad word then


def add_bias(logits: Scores, bias: Mapping[int, float]) -> Scores:
    """Logits (V,) with a number added to those of some ids; minus infinity bans."""
    biased = logits.astype(np.float64)
    biased[list(bias)] += np.array(list(bias.values()), np.float64)  # an int of Python may fit no int64
    return biased


def suppress(logits: Scores, tokens: Collection[int]) -> Scores:
    """Logits (V,) with those of `tokens` at minus infinity."""
    banned = logits.copy()
    banned[list(tokens)] = -np.inf
    return banned


def force(logits: Scores, token: int) -> Scores:
    """Logits (V,) with all but that of `token` at minus infinity."""
    forced = np.full_like(logits, -np.inf)
    forced[token] = 0
    return forced


def bad_words(bad_words_ids: Collection[Sequence[int]], end_ids: Collection[int] = ()) -> BadWords:
    """`ban_bad_words` reads this. As in transformers, an EOS token alone is no bad word."""
    found: dict[tuple[int, ...], list[int]] = {}
    for word in bad_words_ids:
        *before, end = map(int, word)
        if before or end not in end_ids:
            found.setdefault(tuple(before), []).append(end)
    return found


def ban_bad_words(logits: Scores, seen: Sequence[int] | IdArray, words: BadWords) -> Scores:
    """Logits (V,) with each id at minus infinity that would end a bad word whose other ids `seen` ends with."""
    length = max(map(len, words), default=0)
    ending = tuple(np.asarray(seen, np.int64)[max(0, len(seen) - length) :].tolist())
    banned = [
        token
        for size in {len(before) for before in words}
        if size <= len(ending)
        for token in words.get(ending[len(ending) - size :], ())
    ]
    return suppress(logits, banned) if banned else logits

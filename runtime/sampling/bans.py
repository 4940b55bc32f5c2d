"""Bias, ban or force single tokens. Each function reads logits (V,) and returns new ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from .penalties import IdArray, Scores

BadWords = Mapping[tuple[int, ...], Sequence[int]]  # all but the last id of a bad word -> its last ids


def add_bias(logits: Scores, bias: Mapping[int, float]) -> Scores:
    """Logits (V,) plus a bias for some ids; minus infinity bans an id."""
    biased = logits.astype(np.float64)
    biased[list(bias)] += np.array(list(bias.values()), np.float64)  # a Python int may exceed int64
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
    """The table for `ban_bad_words`. As in transformers, a single EOS token is ignored."""
    found: dict[tuple[int, ...], list[int]] = {}
    for word in bad_words_ids:
        *before, end = map(int, word)
        if before or end not in end_ids:
            found.setdefault(tuple(before), []).append(end)
    return found


def ban_bad_words(logits: Scores, seen: Sequence[int] | IdArray, words: BadWords) -> Scores:
    """Logits (V,) with minus infinity at each id that would complete a bad word at the end of `seen`."""
    length = max(map(len, words), default=0)
    ending = tuple(np.asarray(seen, np.int64)[max(0, len(seen) - length) :].tolist())
    banned = [
        token
        for size in {len(before) for before in words}
        if size <= len(ending)
        for token in words.get(ending[len(ending) - size :], ())
    ]
    return suppress(logits, banned) if banned else logits

"""The random numbers for sampling: a pure function of the seed and a token's position in the sequence.

So a seed samples the same text in one call or several, alone or in a batch, and in every program that computes this
function. docs/bundle-format.md specifies it with known answers, and `export/generation/` writes it as a graph.

Threefry2x32 with 20 rounds: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

MAX_SEED = 2**63 - 1  # fits an int64
DRAW = 0  # lane of the number that draws the token; other lanes give more numbers per position
EXCLUDE = 1  # lane of the number that decides whether XTC applies
_BLOCK = 64  # numbers that are computed at once
_CONTINUATION = 2**32 - 1  # lane that derives a completion's seed
WORD = 2**32 - 1
PARITY = 0x1BD11BDA
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry2x32(key: tuple[int, int], counter: tuple[Any, int]) -> tuple[Any, Any]:
    """Two words of 32 bits from a key and a counter of two words each; arrays of uint64 from an array of counters."""
    keys = (*key, key[0] ^ key[1] ^ PARITY)
    x, y = (counter[0] + keys[0]) & WORD, (counter[1] + keys[1]) & WORD
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x = (x + y) & WORD
            y = (((y << rotation) & WORD) | (y >> (32 - rotation))) ^ x
        x = (x + keys[(group + 1) % 3]) & WORD
        y = (y + keys[(group + 2) % 3] + group + 1) & WORD
    return x, y


def uniform(seed: int, place: int, lane: int = DRAW) -> float:
    """The number in [0, 1), of 53 bits, for the token with `place` tokens before it in the whole sequence."""
    return float(_numbers(seed, place, lane))


def _numbers(seed: int, places: Any, lane: int) -> Any:
    x, y = threefry2x32((seed & WORD, seed >> 32), (places, lane))
    return (((x >> 5) << 26) + (y >> 6)) * 2.0**-53


class Uniforms:
    """`uniform` of one seed at places that mostly follow one another. Behind a run, computing one costs 20 us."""

    def __init__(self, seed: int) -> None:
        self._seed, self._first = seed, 0
        self._found: list[float] = []

    def at(self, place: int) -> float:
        """The number for a place."""
        if not 0 <= place - self._first < len(self._found):
            places = np.arange(place, place + _BLOCK, dtype=np.uint64)
            self._first, self._found = place, _numbers(self._seed, places, DRAW).tolist()
        return self._found[place - self._first]


def continuation_seed(seed: int, number: int) -> int:
    """The seed of completion `number` of one prompt; number 0 has `seed` itself."""
    if not number:
        return seed
    low, high = threefry2x32((seed & WORD, seed >> 32), (number, _CONTINUATION))
    return int((low | high << 32) & MAX_SEED)


def fresh_seed() -> int:
    """An unpredictable seed."""
    return int.from_bytes(os.urandom(8)) & MAX_SEED

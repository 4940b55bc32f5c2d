"""The stream against the published answers, and what a stream of random numbers must be."""

from __future__ import annotations

import pytest

from pastkey.runtime.sampling.random_stream import (
    MAX_SEED,
    continuation_seed,
    fresh_seed,
    threefry2x32,
    uniform,
)

WORD = 2**32 - 1


# Random123 1.14, tests/kat_vectors, "threefry2x32 20".
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((WORD, WORD), (WORD, WORD), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_the_generator_gives_the_published_answers(counter, key, answer):
    assert threefry2x32(key, counter) == answer


# In docs/bundle-format.md as well, for whoever writes the stream in another language.
@pytest.mark.parametrize(
    ("seed", "place", "number"),
    [
        (0, 0, 0.41845711022987275),
        (0, 1, 0.3146817218764961),
        (1, 5, 0.49113639551488),
        (MAX_SEED, 1000, 0.0955491390217722),
    ],
)
def test_the_documented_numbers(seed, place, number):
    assert uniform(seed, place) == number


def test_a_lane_is_a_stream_of_its_own():
    assert len({uniform(1, 2, lane) for lane in range(8)}) == 8


def test_a_continuation_has_a_seed_of_its_own():
    seeds = [continuation_seed(seed, number) for seed in (0, 1, MAX_SEED) for number in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed <= MAX_SEED for seed in seeds)
    assert [continuation_seed(seed, 0) for seed in (0, 1, MAX_SEED)] == [0, 1, MAX_SEED]
    # In docs/bundle-format.md as well.
    assert continuation_seed(1, 1) == 3683160032914396005
    assert continuation_seed(MAX_SEED, 7) == 6868561896620353006


def test_a_fresh_seed_is_another_one_each_time():
    seeds = {fresh_seed() for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed <= MAX_SEED for seed in seeds)

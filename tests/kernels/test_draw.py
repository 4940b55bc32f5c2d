"""The library's choice of a token is that of the stages, at each level in a process of its own.

As a program: checks the level that PASTKEY_KERNELS names.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

SIZE = 5003  # no multiple of a part
SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "logit_bias": {3: 2.5, 4: -math.inf}},
    {"temperature": 0.8},
    {"temperature": 1.0, "frequency_penalty": 0.3, "penalty_last_n": 20},
    {"temperature": 0.9, "logit_bias": {5: 20.0, 7: -math.inf}, "repetition_penalty": 0.5},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 40, "presence_penalty": 2.0},
    {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2},
    {"temperature": 0.3, "top_p": 0.99, "min_p": 0.02},
    {"temperature": 0.7, "top_k": 60, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1},
]


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_the_tokens_of_a_level_are_those_of_the_stages(level):
    environment = {**os.environ, "PASTKEY_KERNELS": level, "ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600)
    if "a level that this CPU or this build lacks" in done.stderr:
        pytest.skip(f"this machine has no {level}")
    assert done.returncode == 0, done.stderr


def check_level() -> None:
    from pastkey.runtime.providers.native import native_kernels
    from pastkey.runtime.sampling.native import NativeDraw
    from pastkey.runtime.sampling.sampler import Sampler
    from pastkey.runtime.settings import SamplingConfig

    found = native_kernels()
    assert found is not None
    assert not found.refused, found.refused
    rng, library = np.random.default_rng(0), found.library

    steep = rng.permutation(7.3 - 1.5 * np.log(np.arange(1, SIZE + 1))).astype(np.float32)
    spread = (3 * rng.standard_normal(SIZE)).astype(np.float32)
    masked = np.where(rng.random(SIZE) < 0.9, np.float32(-np.inf), spread)
    for logits in (steep, spread, np.round(spread, 1), masked):
        for one in SETTINGS:
            sampler = Sampler(SamplingConfig(seed=3, **one), library=library)
            stages = Sampler(SamplingConfig(seed=3, **one))
            assert sampler._native is not None
            ids = [*rng.integers(0, SIZE, 60).tolist(), *np.argsort(-logits)[:5].tolist()]
            for _ in range(10):
                text, u = np.array(ids), float(rng.random())
                assert sampler(logits, ids) == stages(logits, ids), one
                assert sampler._native(logits, text, u) is not None, f"{one} was not decided"
                ids.append(int(rng.integers(0, SIZE)))

    def draw(logits: np.ndarray, u: float, text: list[int] = [], **one: Any) -> int | None:  # noqa: B006 - only read
        made = NativeDraw.of(library, SamplingConfig(**one))
        assert made is not None
        return made(logits.astype(np.float32), np.array(text, np.int64), u)

    made = NativeDraw.of(library, SamplingConfig(temperature=1.0, top_k=1))
    assert made is not None
    rows = np.zeros((3, SIZE), np.float32)  # as of a run with drafts: each in a place of its own
    rows[[0, 1, 2], [7, 9, 4000]] = 5
    assert [made(row, None, 0.5) for row in rows] == [7, 9, 4000]
    assert [made(rows[2:][0], None, 0.5), made(rows[:1][0], None, 0.5)] == [4000, 7]

    for other_bytes in (-8, 8):  # of a pastkey whose call has other fields
        made._given.bytes += other_bytes
        assert made(rows[0], None, 0.5) is None
        made._given.bytes -= other_bytes
    assert made(rows[0], None, 0.5) == 7

    even = np.zeros(1024)
    for one in ({}, {"min_p": 0.5}, {"top_k": 16}):
        assert draw(even, 0.5, temperature=1.0, **one) is None  # between two tokens
        assert draw(even, 0.5 + 1 / 2048, temperature=1.0, **one) == 512
    assert draw(even, 0.5, temperature=1.0, top_p=0.5) is None
    assert draw(np.full(7, -np.inf), 0.5, temperature=1.0) is None  # every token is banned
    assert draw(np.array([3e38, -3e38]), 0.5, temperature=1.0) is None  # beyond what the error bound covers
    assert draw(even, 0.5, repetition_penalty=2.0, text=[1024]) is None
    assert draw(even, 0.5, presence_penalty=1.0, text=[-1]) is None
    for other in ({}, {"temperature": 1e-4}, {"temperature": 1.0, "typical_p": 0.9}, {"no_repeat_ngram_size": 3}):
        assert Sampler(SamplingConfig(**other), library=library)._native is None
    assert draw(even[:40], 0.3, temperature=1.0, top_k=2) is None  # more candidates than parts


if __name__ == "__main__":
    check_level()

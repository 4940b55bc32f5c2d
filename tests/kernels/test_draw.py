"""The library's choice of a token is that of the sampling vectors, at each level in a separate process.

As a program: checks the level that PASTKEY_KERNELS names.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tools.versions import ROOT

SIZE = 5003  # no multiple of a part


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_the_tokens_of_a_level_are_those_of_the_stages(level):
    environment = {**os.environ, "PASTKEY_KERNELS": level, "ORT_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "tests.kernels.test_draw"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    if "a level that this CPU or this build lacks" in done.stderr:
        pytest.skip(f"this machine has no {level}")
    assert done.returncode == 0, done.stderr


def check_level() -> None:
    from pastkey.runtime.providers.native import native_kernels
    from pastkey.runtime.sampling.native import AllFinite, NativeDraw
    from pastkey.runtime.sampling.sampler import Sampler
    from pastkey.runtime.settings import SamplingConfig

    from ..runtime.sampling.vectors import sampling_vectors

    library = native_kernels().library
    for vector in sampling_vectors():
        config = SamplingConfig(**vector.options)
        sampler, stages = Sampler(config, library=library), Sampler(config)
        logits, text = vector.logits, np.array(vector.ids, np.int64)
        if vector.settings.get("top_k", 0) <= logits.size // 64:
            assert sampler._native(logits, text, vector.u) == vector.expected, vector.name
        for more in range(8):  # other numbers
            ids = [*vector.ids, *[0] * more]
            assert sampler(logits, ids) == stages(logits, ids), vector.name

    def draw(logits: np.ndarray, u: float, text: tuple[int, ...] = (), **one: Any) -> int | None:
        made = NativeDraw.of(library, SamplingConfig(**one))
        return made(logits.astype(np.float32), np.array(text, np.int64), u)

    made = NativeDraw.of(library, SamplingConfig(temperature=1.0, top_k=1))
    rows = np.zeros((3, SIZE), np.float32)  # as of a run with drafts: each in a separate place
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
    assert draw(even, 0.5, repetition_penalty=2.0, text=(1024,)) is None
    assert draw(even, 0.5, presence_penalty=1.0, text=(-1,)) is None
    assert draw(even, 0.5) == 0
    for other in ({"temperature": 1e-4}, {"temperature": 1.0, "typical_p": 0.9}, {"no_repeat_ngram_size": 3}):
        assert Sampler(SamplingConfig(**other), library=library)._native is None
    assert draw(even[:40], 0.3, temperature=1.0, top_k=2) is None  # more candidates than parts

    finite, results = AllFinite(library), np.full((1, 1, SIZE), -3e38, np.float32)
    for place in (0, SIZE - 1):
        for wrong in (np.nan, -np.nan, np.inf, -np.inf):
            assert finite(results)
            results[0, 0, place] = wrong
            assert not finite(results)
            assert not finite(np.stack([results[0]] * 2, 1))
            assert finite(results[:, :, 1:-1])
            results[0, 0, place] = 3e38


if __name__ == "__main__":
    check_level()

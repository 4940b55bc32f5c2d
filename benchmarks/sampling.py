"""What choosing one token costs, by the settings: microseconds of one thread's processor time.

    python -m benchmarks.sampling

The logits are of 49,152 tokens, in any order, whose probabilities fall as rank ** -1.5: about 60 of them have 0.9
together. The text before them has 300 tokens.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from pastkey.runtime.sampling.sampler import Sampler
from pastkey.runtime.settings import SamplingConfig

ROUNDS = 15
CALLS = 20
SETTINGS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.1},
    {"presence_penalty": 0.5},
    {"no_repeat_ngram_size": 3},
    {"dry_multiplier": 0.8},
    {"temperature": 0.8},
    {"temperature": 0.8, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 40},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1},
    {"temperature": 0.8, "top_n_sigma": 1.0},
    {"temperature": 0.8, "typical_p": 0.9},
]


def main() -> None:
    generator = np.random.default_rng(0)
    logits = generator.permutation(-1.5 * np.log(np.arange(1, 49_153))).astype(np.float32)
    ids = generator.integers(0, logits.size, 300).tolist()
    samplers = [Sampler(SamplingConfig(seed=1, **settings), prompt_tokens=len(ids)) for settings in SETTINGS]
    seconds: list[list[float]] = [[] for _ in samplers]
    for _ in range(ROUNDS):  # each in turn, so that all see the same machine
        for sampler, found in zip(samplers, seconds, strict=True):
            started = time.thread_time()
            for _ in range(CALLS):
                sampler(logits, ids)
            found.append((time.thread_time() - started) / CALLS)
    for settings, found in zip(SETTINGS, seconds, strict=True):
        named = ", ".join(f"{name}={value}" for name, value in settings.items()) or "greedy"
        print(f"{statistics.median(found) * 1e6:7.0f} ({min(found) * 1e6:.0f} to {max(found) * 1e6:.0f})  {named}")


if __name__ == "__main__":
    main()

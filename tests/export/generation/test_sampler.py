"""The graph's tokens and those of the runtime's sampler, on logits of every kind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pastkey.contract import names
from pastkey.export.generation.sampler import Settings, choose
from pastkey.export.generation.write import settings as as_feeds
from pastkey.runtime import SamplingConfig
from pastkey.runtime.sampling.random_stream import uniform
from pastkey.runtime.sampling.sampler import Sampler

from .small_models import BOOL, DOUBLE, FLOAT, INT64, run


@functools.cache
def sampler(vocab_size: int) -> Callable[..., Any]:
    inputs: dict[str, tuple[ir.DataType, list[int | str | None]]] = {
        "logits": (FLOAT, [vocab_size]),
        "seen": (BOOL, [vocab_size]),
        "u": (DOUBLE, [1]),
        "top_k": (INT64, [1]),
    }
    inputs |= dict.fromkeys(names.GENERATE_NUMBERS, (FLOAT, [1]))
    return run(
        inputs,
        lambda n, g: choose(
            n,
            g["logits"],
            g["seen"],
            g["u"],
            Settings(**{name: g[name] for name in ("top_k", *names.GENERATE_NUMBERS)}),
            vocab_size,
        ),
        INT64,
    )


def both(logits: np.ndarray, ids: list[int], config: SamplingConfig) -> tuple[int, int]:
    assert config.seed is not None
    seen = np.zeros(logits.size, bool)
    seen[ids] = True
    u = np.array([uniform(config.seed, len(ids))])
    token = sampler(logits.size)(logits=logits, seen=seen, u=u, **as_feeds(config, 1))
    assert token.shape == (1,)
    return int(token[0]), Sampler(config)(logits, ids)


CONFIGS = [
    SamplingConfig(seed=0),
    SamplingConfig(repetition_penalty=1.5, seed=0),
    SamplingConfig(temperature=0.7, seed=1),
    SamplingConfig(temperature=1.0, top_k=1, seed=2),
    SamplingConfig(temperature=1.0, top_k=10**6, seed=2),
    SamplingConfig(temperature=1.3, top_p=0.5, seed=3),
    SamplingConfig(temperature=1.0, min_p=1.0, seed=4),
    SamplingConfig(temperature=2.0, top_k=30, top_p=0.8, min_p=0.01, repetition_penalty=1.2, seed=5),
]


@pytest.mark.parametrize("vocab_size", [1, 7, 3000])
@pytest.mark.parametrize("config", CONFIGS)
def test_random_logits(config, vocab_size):
    rng = np.random.default_rng(vocab_size)
    pairs = [
        both(
            rng.normal(0, 3, vocab_size).astype(np.float32),
            rng.integers(0, vocab_size, int(rng.integers(0, 40))).tolist(),
            config,
        )
        for _ in range(40)
    ]
    assert [pair[0] for pair in pairs] == [pair[1] for pair in pairs]
    if config.temperature and vocab_size == 3000 and config.top_k != 1 and config.min_p != 1:
        assert len({pair[0] for pair in pairs}) > 10


@given(
    logits=arrays(np.float32, 12, elements=st.sampled_from([-5.0, 0.0, 0.5, 0.5, 2.0, 2.0, 80.0, -np.inf])),
    temperature=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.1, 0.25, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.25, 1.0]),
    penalty=st.sampled_from([0.5, 1.0, 1.25]),
    seed=st.integers(0, 2**63 - 1),
    ids=st.lists(st.integers(0, 11), max_size=10),
)
def test_ties_and_what_cannot_be(logits, temperature, top_k, top_p, min_p, penalty, seed, ids):
    if np.isinf(logits).all():
        logits[3] = 0
    config = SamplingConfig(temperature, top_k, top_p, min_p, penalty, seed)
    graph, runtime = both(logits, ids, config)
    assert graph == runtime

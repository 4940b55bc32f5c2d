"""The graph's tokens are those of the sampling vectors, and of the runtime's sampler on logits of every kind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pastkey.contract import names
from pastkey.export.generation.sampler import Settings, choose
from pastkey.export.generation.write import settings as as_feeds
from pastkey.runtime import SamplingConfig
from pastkey.runtime.sampling.random_stream import uniform
from pastkey.runtime.sampling.sampler import Sampler

from ...runtime.sampling.vectors import sampling_vectors
from .small_models import BOOL, DOUBLE, FLOAT, INT64, run


@functools.cache
def sampler(vocab_size: int) -> Callable[..., Any]:
    inputs = {"logits": (FLOAT, [vocab_size]), "seen": (BOOL, [vocab_size]), "u": (DOUBLE, [1]), "top_k": (INT64, [1])}
    inputs |= dict.fromkeys(names.GENERATE_NUMBERS, (FLOAT, [1]))

    def chosen(nodes, given):
        settings = Settings(**{name: given[name] for name in ("top_k", *names.GENERATE_NUMBERS)})
        return choose(nodes, given["logits"], given["seen"], given["u"], settings, vocab_size)

    return run(inputs, chosen, INT64)


def drawn(logits: np.ndarray, ids: list[int], config: SamplingConfig) -> int:
    """The graph's token."""
    seen = np.zeros(logits.size, bool)
    seen[ids] = True
    u = np.array([uniform(config.seed, len(ids))])
    token = sampler(logits.size)(logits=logits, seen=seen, u=u, **as_feeds(config, 1))
    assert token.shape == (1,)
    return int(token[0])


def test_a_vectors_token_is_drawn():
    for vector in sampling_vectors():
        if vector.generates:
            assert drawn(vector.logits, vector.ids, SamplingConfig(**vector.options)) == vector.expected, vector.name


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
    assert drawn(logits, ids, config) == Sampler(config)(logits, ids)

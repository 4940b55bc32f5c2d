"""Branches, constants and checks, as onnxruntime runs them."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pastkey.contract import names
from pastkey.export.generation.random_stream import uniforms
from pastkey.export.generation.sampler import Settings, choose
from pastkey.export.generation.utf8 import DROPPED, REPLACED, whole_characters
from pastkey.export.generation.write import settings as as_feeds
from pastkey.runtime import SamplingConfig
from pastkey.runtime.sampling.random_stream import MAX_SEED, uniform
from pastkey.runtime.sampling.sampler import Sampler

from ...runtime.sampling.vectors import sampling_vectors
from .small_models import BOOL, DOUBLE, FLOAT, INT64, run


def test_a_branch_gives_what_its_condition_says():
    def branches(nodes, given):
        on, x = given["on"], given["x"]

        def otherwise(inner):
            return inner.branch(on, lambda _: x, lambda innermost: innermost.add("Neg", x), of=x)

        return nodes.branch(on, lambda inner: inner.add("Add", x, inner.number(1, np.float32)), otherwise, of=x)

    call = run({"on": (BOOL, []), "x": (FLOAT, [3])}, branches, FLOAT)
    x = np.array([1, 2, 3], np.float32)
    np.testing.assert_array_equal(call(on=np.array(True), x=x), x + 1)
    np.testing.assert_array_equal(call(on=np.array(False), x=x), -x)


def test_a_check_is_nought_or_an_error_with_the_sentence():
    def check(nodes, given):
        return nodes.require(nodes.add("Less", given["x"], nodes.number(5)), "x must be less than 5")

    call = run({"x": (INT64, [1])}, check, INT64)
    assert call(x=np.array([4])).tolist() == [0]
    with pytest.raises(Exception, match="x must be less than 5"):
        call(x=np.array([5]))


# --- the graph's numbers and the runtime's, to the last bit -----------------------------------------------------------
SEEDS = [0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**53 + 1, 2**62, MAX_SEED - 1, MAX_SEED]


@pytest.mark.parametrize("seed", [*SEEDS, *np.random.default_rng(0).integers(0, MAX_SEED, 4).tolist()])
def test_they_are_the_runtimes(seed):
    inputs = {"seed": (INT64, [1]), "places": (INT64, ["n"])}
    call = run(inputs, lambda nodes, given: uniforms(nodes, given["seed"], given["places"]), DOUBLE)
    places = [*range(300), 2**31 - 1, 2**31, 2**32 - 1]
    found = call(seed=np.array([seed]), places=np.array(places))
    assert found.tolist() == [uniform(seed, place) for place in places]


# --- whole characters of any bytes, as Python decodes them ------------------------------------------------------------
@functools.cache
def graph() -> Callable[..., Any]:
    return run({"stream": (INT64, ["n"])}, lambda n, given: whole_characters(n, given["stream"]), INT64)


def decoded(content: bytes) -> str:
    found = graph()(stream=np.array(list(content), np.int64)).tolist()
    parts = ["�".encode() if byte == REPLACED else bytes([byte]) for byte in found if byte != DROPPED]
    return b"".join(parts).decode()  # strictly: what is left is UTF-8


def expected(content: bytes) -> str:
    """What is whole: a decoder that waits for more holds an unfinished character back."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(content)


ENDS = bytes.fromhex("00417f808f909fa0bfc0c2dfe0e1edeff0f1f4f5ff")  # of the ranges of UTF-8


@settings(deadline=None)  # the first call builds the graph
@given(st.lists(st.sampled_from(ENDS), max_size=12).map(bytes))
def test_any_bytes(content):
    assert decoded(content).rstrip("�") == expected(content).rstrip("�")
    if not content or content[-1] < 0x80:
        assert decoded(content) == expected(content)


@given(st.text(max_size=12), st.integers(0, 3))
def test_a_text_that_is_cut_anywhere(text, cut):
    content = text.encode("utf-8", "replace")
    content = content[: len(content) - cut]
    assert decoded(content) == expected(content)


# --- tokens are those of the sampling vectors, and of the runtime's sampler on logits of every kind -------------------
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


@settings(deadline=None)
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

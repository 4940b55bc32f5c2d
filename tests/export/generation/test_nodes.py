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

from pastkey.export.generation.random_stream import uniforms
from pastkey.export.generation.utf8 import DROPPED, REPLACED, whole_characters
from pastkey.runtime.sampling.random_stream import MAX_SEED, uniform

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

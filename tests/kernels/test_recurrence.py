"""DecoderRecurrence and DecoderConvolution against onnxruntime's operators and themselves, at every level."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from onnx import helper

from .conftest import each_level
from .graphs import graph
from .running import Array, Case
from .test_random import CASES, Random, some_wrong

Inputs = tuple[dict[str, Array], dict[str, Any]]  # and attributes
NATIVE = {"LinearAttention": "DecoderRecurrence", "CausalConvWithState": "DecoderConvolution"}
STATE = "past_state"


def operator(name: str, inputs: Mapping[str, Array], attributes: Mapping[str, Any], threads: int = 1) -> Case:
    """One node whose inputs have an order, in which None is left out; onnxruntime's name and domain, or ours."""
    ours = name in NATIVE.values()
    node = helper.make_node(name, [*inputs], ["y", "present_state"], domain="pastkey" if ours else "com.microsoft",
                            **attributes)  # fmt: skip
    return Case(graph([node], {}, [name for name in inputs if name], node.output), [feed_of(inputs)], threads)


def feed_of(inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {name: array for name, array in inputs.items() if name}


def recurrence(rule: str, heads: tuple[int, int, int], d: int, width: int, tokens: int, *, batch: int = 2,
               per_key: bool = False, one_beta: bool = False, seed: int = 0) -> Inputs:  # fmt: skip
    """`heads`: of queries, keys and values."""
    rng = np.random.default_rng([seed, d, width, tokens])

    def draw(columns: int) -> Array:
        return np.asarray(rng.standard_normal((batch, tokens, columns)), np.float32)

    of_query, of_key, of_value = heads
    inputs = {
        "query": draw(of_query * d),
        "key": draw(of_key * d) / np.float32(d**0.5),
        "value": draw(of_value * width),
    }
    inputs[STATE] = rng.standard_normal((batch, of_value, d, width)).astype(np.float32)
    if "gated" in rule:
        inputs["decay"] = -np.abs(draw(of_value * (d if per_key else 1)))
        inputs["decay"][:, 0] = -100  # forgets all
    if "delta" in rule:
        inputs |= {} if "decay" in inputs else {"": np.empty(0)}
        inputs["beta"] = np.abs(np.sin(draw(1 if one_beta else of_value)))
    return inputs, {"update_rule": rule, "q_num_heads": of_query, "kv_num_heads": of_value, "scale": 0.3}


RECURRENCES: dict[str, Inputs] = {
    f"{rule}, {heads} of {d} and {width}, {tokens} tokens, {more}": recurrence(rule, heads, d, width, tokens, **more)
    for rule, heads, d, width, tokens, more in (
        ("gated_delta", (4, 4, 4), 128, 128, 5, {}),
        ("gated_delta", (2, 2, 6), 32, 48, 70, {}),
        ("gated_delta", (3, 3, 3), 64, 80, 1, {"per_key": True}),
        ("delta", (2, 1, 2), 16, 16, 9, {"one_beta": True}),
        ("gated", (1, 1, 4), 256, 64, 20, {}),
        ("gated", (2, 2, 2), 48, 16, 20, {"per_key": True}),
        ("linear", (2, 2, 4), 32, 112, 20, {}),
    )
}  # fmt: skip


def convolution(channels: int, taps: int, tokens: int, activation: str, *, bias: bool) -> Inputs:
    rng = np.random.default_rng([channels, taps])

    def draw(*shape: int) -> Array:
        return np.asarray(rng.standard_normal(shape), np.float32)

    inputs = {"x": draw(2, tokens, channels) * 4, "weight": draw(channels, 1, taps)}
    inputs["bias" if bias else ""] = draw(channels)
    return {**inputs, STATE: draw(2, channels, taps - 1)}, {"activation": activation}


CONVOLUTIONS: dict[str, Inputs] = {
    f"{taps} taps of {channels}, {tokens} tokens": convolution(channels, taps, tokens, activation, bias=bias)
    for channels, taps, tokens, activation, bias in (
        (16, 2, 1, "silu", False), (160, 4, 1, "silu", True), (400, 4, 37, "silu", False), (48, 7, 3, "none", True),
        (32, 8, 20, "silu", True),
    )
}  # fmt: skip
ALL = {name: ("LinearAttention", *inputs) for name, inputs in RECURRENCES.items()}
ALL |= {name: ("CausalConvWithState", *inputs) for name, inputs in CONVOLUTIONS.items()}


def theirs(name: str, inputs: dict[str, Array], attributes: dict[str, Any]) -> Case:
    """onnxruntime's convolution has channels before tokens."""
    x = {"x": np.ascontiguousarray(inputs["x"].swapaxes(1, 2))} if "x" in inputs else {}
    return operator(name, inputs | x, attributes)


def part(name: str, inputs: dict[str, Array], attributes: dict[str, Any], tokens: slice, state: Array) -> Case:
    of_tokens = {key: array[:, tokens] for key, array in feed_of(inputs).items()
                 if key not in ("weight", "bias", STATE)}  # fmt: skip
    return operator(NATIVE[name], {**inputs, **of_tokens, STATE: state}, attributes)


@pytest.fixture(scope="module")
def outcomes(run):
    @functools.cache
    def once(level):
        cases: dict[Any, Case] = {}
        for key, (name, inputs, attributes) in ALL.items():
            for threads in (1, 2):
                cases[key, threads] = operator(NATIVE[name], inputs, attributes, threads)
            if level == "portable":
                cases[key, "theirs"] = theirs(name, inputs, attributes)
        found = run(level, cases)
        assert {key: outcome.error for key, outcome in found.items() if outcome.error} == {}
        return found

    return once


@pytest.mark.parametrize("key", ALL)
def test_equals_onnxruntimes_operator(outcomes, key):
    y, state = outcomes("portable")[key, 1].outputs[0]
    expected, kept = outcomes("portable")[key, "theirs"].outputs[0]
    expected = expected.swapaxes(1, 2) if key in CONVOLUTIONS else expected
    np.testing.assert_allclose(y, expected, rtol=0, atol=3e-6 * np.abs(expected).max())
    np.testing.assert_allclose(state, kept, rtol=0, atol=3e-6 * np.abs(kept).max())


@each_level
@pytest.mark.parametrize("key", ALL)
def test_every_level_and_number_of_threads_gives_the_bits_of_the_reference(outcomes, level, key):
    reference = outcomes("portable")[key, 1].outputs[0]
    for threads in (1, 2):
        for ours, theirs in zip(outcomes(level)[key, threads].outputs[0], reference, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@each_level
@pytest.mark.parametrize("key", [next(iter(RECURRENCES)), [*CONVOLUTIONS][2]])
def test_tokens_have_the_bits_in_two_runs_that_they_have_in_one(run, outcomes, level, key):
    given = ALL[key]
    whole, last = outcomes(level)[key, 1].outputs[0]
    first, state = run(level, {0: part(*given, slice(1), given[1][STATE])})[0].outputs[0]
    rest, state = run(level, {0: part(*given, slice(1, None), state)})[0].outputs[0]
    np.testing.assert_array_equal(np.concatenate([first, rest], 1), whole)
    np.testing.assert_array_equal(state, last)


R, C = RECURRENCES[[*RECURRENCES][1]], CONVOLUTIONS[[*CONVOLUTIONS][1]]
WRONG: dict[str, tuple[str, Inputs, dict[str, Array], dict[str, Any], str]] = {
    "no heads": ("LinearAttention", R, {}, {"kv_num_heads": 0}, "kv_num_heads 0, expected positive"),
    "heads no multiple": ("LinearAttention", R, {}, {"q_num_heads": 4}, "q_num_heads is 4 and kv_num_heads 6"),
    "unknown rule": ("LinearAttention", R, {}, {"update_rule": "gru"}, "update_rule is gru, expected linear"),
    "scale": ("LinearAttention", R, {}, {"scale": float("inf")}, "scale is inf"),
    "state of other heads": ("LinearAttention", R, {STATE: np.zeros((2, 5, 32, 48), "f")}, {}, "expected [B, 6, D,"),
    "state of odd sizes": ("LinearAttention", R, {STATE: np.zeros((2, 6, 32, 40), "f")}, {}, "multiples of 16"),
    "state of width 0": ("LinearAttention", R, {STATE: np.zeros((2, 6, 32, 0), "f")}, {}, "multiples of 16"),
    "query of other rows": ("LinearAttention", R, {"query": np.zeros((1, 70, 64), "f")}, {}, "query is [1, 70, 64]"),
    "key heads": ("LinearAttention", R, {"key": np.zeros((2, 70, 128), "f")}, {}, "key is [2, 70, 128]"),
    "value": ("LinearAttention", R, {"value": np.zeros((2, 70, 48), "f")}, {}, "value is [2, 70, 48], expected [2, 70"),
    "decay": ("LinearAttention", R, {"decay": np.zeros((2, 70, 5), "f")}, {}, "decay is [2, 70, 5], expected a number"),
    "beta": ("LinearAttention", R, {"beta": np.zeros((2, 69, 6), "f")}, {}, "beta is [2, 69, 6]"),
    "no decay asked": ("LinearAttention", R, {}, {"update_rule": "delta"}, "expected none"),
    "activation": ("CausalConvWithState", C, {}, {"activation": "relu"}, "activation is relu, expected none or silu"),
    "channels": ("CausalConvWithState", C, {"x": np.zeros((2, 1, 100), "f")}, {}, "multiple of 16"),
    "taps": ("CausalConvWithState", C, {"weight": np.zeros((160, 1, 9), "f")}, {}, "weight is [160, 1, 9]"),
    "bias": ("CausalConvWithState", C, {"bias": np.zeros(16, "f")}, {}, "bias is [16], expected [160]"),
    "state of a convolution": ("CausalConvWithState", C, {STATE: np.zeros((2, 160, 4), "f")}, {}, "past_state is"),
}  # fmt: skip


@pytest.mark.parametrize("level", ["portable", "avx512"])
def test_each_is_refused_with_a_sentence(level, run):
    cases = {key: operator(NATIVE[name], given[0] | changed, given[1] | attributes)
             for key, (name, given, changed, attributes, _) in WRONG.items()}  # fmt: skip
    for key, outcome in run(level, cases).items():
        assert WRONG[key][-1] in outcome.error, (key, outcome.error)


@each_level
def test_a_random_case_ends_in_outputs_or_in_an_error(level, run):
    def drawn(rng: Random) -> Case:
        name, inputs, attributes = ALL[[*ALL][rng.integers(len(ALL))]]
        wrong = some_wrong(rng, feed_of(inputs))
        return operator(NATIVE[name], {key: wrong.get(key, array) for key, array in inputs.items()}, attributes)

    found = run(level, {seed: drawn(np.random.default_rng(seed)) for seed in range(CASES)})
    assert CASES / 10 < sum(bool(outcome.error) for outcome in found.values()) < CASES * 9 / 10

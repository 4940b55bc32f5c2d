"""Hand-made probabilities: every expected value can be worked out in the head."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pastkey.errors import InputError
from pastkey.runtime.sampling import penalties, truncation
from pastkey.runtime.sampling.sampler import Sampler
from pastkey.runtime.settings import SamplingConfig

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
LOGITS = np.log(PROBABILITIES).astype(np.float32)

logit_arrays = arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32))


def kept(logits: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.isfinite(logits)).tolist())


def test_greedy_takes_the_largest() -> None:
    assert Sampler(SamplingConfig())(LOGITS, []) == 1


def test_repetition_penalty_acts_on_greedy_choice() -> None:
    logits = np.array([2.0, 1.5, 0.0], np.float32)
    assert Sampler(SamplingConfig(repetition_penalty=2.0))(logits, [0]) == 1


@given(logits=logit_arrays, seen=st.lists(st.integers(0, 0), max_size=3), p=st.floats(0.01, 0.99), k=st.integers(1, 9))
def test_no_function_writes_into_its_input(logits: np.ndarray, seen: list[int], p: float, k: int) -> None:
    before = logits.copy()
    logits.flags.writeable = False
    for result in (
        penalties.apply_repetition_penalty(logits, seen, 1.5),
        truncation.apply_temperature(logits, 0.7),
        truncation.keep_top_k(logits, k),
        truncation.keep_top_p(logits, p),
        truncation.keep_min_p(logits, p),
    ):
        assert result.shape == logits.shape
    np.testing.assert_array_equal(logits, before)


@given(
    logits=logit_arrays,
    temperature=st.floats(1e-300, 100),
    top_k=st.integers(0, 5),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_whatever_the_settings_a_token_that_is_left_is_drawn(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    token = Sampler(SamplingConfig(temperature, top_k, top_p, min_p, seed=seed))(logits, [])
    assert 0 <= token < logits.size
    if top_k:
        # Logits that differ by less than float64 can tell from the largest are ties.
        assert token in kept(truncation.keep_top_k(truncation.apply_temperature(logits, temperature), top_k))


EXTREMES = st.sampled_from([2e-45, 1e-40, 1e-38, 1.0, 1e38])


@given(
    logits=arrays(np.float32, 12, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    seen=st.lists(st.integers(0, 11), max_size=12),
    penalty=EXTREMES | st.floats(1e-3, 1e3),
    temperature=st.sampled_from([0.0, 5e-324, 1e-300]) | EXTREMES,
    rest=st.sampled_from([{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}]),
)
def test_no_penalty_and_temperature_overflow(
    logits: np.ndarray, seen: list[int], penalty: float, temperature: float, rest: dict[str, Any]
) -> None:
    """A warning of numpy's is an error here, and infinity less infinity is one."""
    config = SamplingConfig(temperature=temperature, repetition_penalty=penalty, seed=0, **rest)
    penalised = penalties.apply_repetition_penalty(logits, seen, penalty)
    assert np.isfinite(penalised).all()
    token = Sampler(config)(logits, seen)
    if temperature <= 1e-300:
        assert penalised[token] == penalised.max()


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1.0])
def test_a_tiny_penalty_repeats_the_likeliest_token_that_was_seen(temperature: float) -> None:
    logits = np.array([1, 3, 2, -1], np.float32)
    sampler = Sampler(SamplingConfig(temperature=temperature, repetition_penalty=1e-40, seed=0))
    assert sampler(logits, [0, 2, 3]) == 2


def test_draws_follow_the_probabilities() -> None:
    sampler = Sampler(SamplingConfig(temperature=1.0, seed=0))
    counts = np.bincount([sampler(LOGITS, [0] * place) for place in range(5000)], minlength=5)
    # Four standard deviations of a share at 5000 draws are at most 0.028.
    np.testing.assert_allclose(counts / 5000, PROBABILITIES, atol=0.028)


def test_a_lower_temperature_sharpens() -> None:
    sampler = Sampler(SamplingConfig(temperature=0.5, seed=0))
    counts = np.bincount([sampler(LOGITS, [0] * place) for place in range(5000)], minlength=5)
    squares = PROBABILITIES**2
    np.testing.assert_allclose(counts / 5000, squares / squares.sum(), atol=0.028)


def test_a_token_without_probability_is_never_drawn() -> None:
    sampler = Sampler(SamplingConfig(temperature=1.0, top_k=2, seed=0))
    assert {sampler(LOGITS, [0] * place) for place in range(500)} == {1, 3}


def test_a_seed_repeats_and_another_does_not() -> None:
    def tokens(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingConfig(temperature=1.0, seed=seed))
        return [sampler(LOGITS, [0] * place) for place in range(50)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert tokens(None) != tokens(None)


def test_a_draw_goes_by_the_seed_and_the_place_alone() -> None:
    sampler = Sampler(SamplingConfig(temperature=1.0, seed=7))
    tokens = [sampler(LOGITS, [0] * place) for place in range(50)]
    assert [sampler(LOGITS, [1] * place) for place in reversed(range(50))] == tokens[::-1]


def test_settings_count_as_float32() -> None:
    settings = {"temperature": 0.7, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1}
    config = Sampler(SamplingConfig(**settings)).config  # type: ignore[arg-type]
    assert {name: getattr(config, name) for name in settings} == {k: float(np.float32(v)) for k, v in settings.items()}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", "1"),
        ("top_k", -1), ("top_k", 1.5), ("top_k", True), ("top_p", 0.0), ("top_p", 1.01), ("top_p", float("nan")),
        ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0), ("seed", -1), ("seed", 0.5),
        ("seed", 2**63), ("temperature", 1e39), ("top_p", 1e-50), ("repetition_penalty", 1e-50),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{field} is .*; it must be "):
        SamplingConfig(**{field: value})


def test_numpy_numbers_are_numbers() -> None:
    SamplingConfig(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.int32(1))  # type: ignore[arg-type]

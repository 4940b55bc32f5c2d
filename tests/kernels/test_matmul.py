"""MatMulInt8 and NormMatMulInt8 against numpy, MatMulNBits and one another, at every level of this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from .matmul_graphs import Weights, gated, matmul, matmul_nbits, norm_matmul, normalize
from .running import LEVELS, Array, Case, Outcome, run_at

SHAPES = [(n, 32 * blocks) for blocks in (1, 3, 5, 17) for n in (1, 17, 33, 100)] + [(96, 1536)]
MANY = 70  # rows
DECODE_ROWS = 8  # up to so many have the bits of one
EPSILON = 1e-5
GATES = [("silu", 0), ("silu", -1), ("gelu", 1), ("gelu", -1), ("gelu_tanh", 0), ("gelu_tanh", -1), ("", 1)]
NORMS = [(norm, skip, beta, summed) for norm in ("rms", "layer") for skip in (0, 1) for beta in (0, 1) for summed in (0, 1)]


def rows(k: int, count: int = MANY) -> Array:
    """X [count, k]: of several magnitudes, one of zeros, one with a block of zeros."""
    x = np.random.default_rng(k).standard_normal((count, k)).astype(np.float32)
    x[1] *= 1e-3
    x[3] *= 1000
    x[5] = 0
    x[6, :32] = 0
    return x


def slices(x: Array) -> list[dict[str, Array]]:
    return [{"x": x[:m]} for m in range(1, 10)] + [{"x": x[:31]}, {"x": x[:33]}, {"x": x}, {"x": x[4:5]}]


def special(k: int) -> Array:
    """Rows with a NaN, an infinity, huge floats, and subnormal ones."""
    x = rows(k, 12)
    x[0, 7], x[1, k - 1], x[2, 0] = np.nan, np.inf, -np.inf
    x[3], x[4] = 1e30, 1e-41
    return x


def cases() -> dict[Any, Case]:
    made: dict[Any, Case] = {}
    for n, k in SHAPES:
        weights = Weights.draw(n, k)
        x = slices(rows(k))
        made["nbits", n, k] = Case(matmul_nbits(weights), x)
        for terms in (1, 2):
            for kind in ("codes", "floats"):
                model = matmul(weights.named(kind == "floats", bias=n == 33), terms=terms)
                made[kind, n, k, terms] = Case(model, x)
        for threads in (2, 3, 4):
            made["threads", n, k, threads] = Case(matmul(weights.named(bias=n == 33)), x, threads)
    for activation, gate in GATES:
        for n, k in ((34, 160), (200, 576)):
            model = matmul(Weights.draw(n, k).named(bias=True), activation=activation, gate=gate, terms=2)
            made["gate", activation, gate, n, k] = Case(model, slices(rows(k)), threads=2)
    for norm, skip, beta, summed in NORMS:
        weights = Weights.draw(34, 160)
        rng = np.random.default_rng(7)
        scales = {"gamma": rng.random(160).astype(np.float32)} | ({"beta": weights.bias[:1].repeat(160)} if beta else {})
        model = norm_matmul(
            weights.named() | scales, skip=bool(skip), beta=bool(beta), summed=bool(summed), norm=norm, epsilon=EPSILON
        )
        feeds = [feed | ({"skip": feed["x"][:, ::-1].copy() * 0.5} if skip else {}) for feed in slices(rows(160))]
        made["norm", norm, skip, beta, summed] = Case(model, feeds)
    for terms in (1, 2):
        feeds = [{"x": special(160)}, *({"x": row[None]} for row in special(160))]
        made["special", terms] = Case(matmul(Weights.draw(33, 160).named(), terms=terms), feeds)
    weights = Weights.draw(34, 64)
    made["empty",] = Case(matmul(weights.named(), gate=0), [{"x": np.zeros((0, 64), np.float32)}])
    return made


CASES = cases()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[Any, Outcome]]:
    """The outcomes of all cases at a level, run once."""
    known: dict[str, list[Outcome] | None] = {}

    def run(level: str) -> dict[Any, Outcome]:
        if level not in known:
            known[level] = run_at(level, list(CASES.values()), tmp_path_factory.mktemp(level))
        found = known[level]
        if found is None:
            pytest.skip(f"this machine has no {level}")
        assert [outcome.error for outcome in found if outcome.error] == []
        return dict(zip(CASES, found, strict=True))

    return run


Outcomes = Callable[[str], dict[Any, Outcome]]
each_level = pytest.mark.parametrize("level", LEVELS)


def same(a: Sequence[Array], b: Sequence[Array]) -> bool:
    """Bit for bit, but for the payload of NaN."""
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


def error(found: Array, expected: Array) -> float:
    """The largest difference, in units of each row's largest."""
    largest = np.abs(expected).max(axis=1, keepdims=True) + 1e-30
    return float((np.abs(found - expected) / largest).max())


def by_tiles(level: str, m: int) -> bool:
    return level == "amx" and m > DECODE_ROWS


@each_level
def test_every_level_gives_the_bits_of_the_reference(outcomes: Outcomes, level: str) -> None:
    found, reference = outcomes(level), outcomes("portable")
    for key, case in CASES.items():
        if key[0] == "nbits":
            continue
        for feed, ours, theirs in zip(case.feeds, found[key].outputs, reference[key].outputs, strict=True):
            if not by_tiles(level, len(feed["x"])):
                assert same(ours, theirs), (key, len(feed["x"]))


@each_level
def test_a_row_has_the_same_bits_among_others_and_with_any_number_of_threads(outcomes: Outcomes, level: str) -> None:
    found = outcomes(level)
    for key, case in CASES.items():
        if key[0] in ("nbits", "special", "empty"):
            continue
        all_rows, tiled = found[key].outputs[11], found[key].outputs[9]
        for feed, outputs in zip(case.feeds[:12], found[key].outputs, strict=False):
            m = len(feed["x"])
            whole = tiled if by_tiles(level, m) else found[key].outputs[7]
            count = min(m, len(whole[0]))
            assert same([y[:count] for y in outputs], [y[:count] for y in whole]), (key, m)
            if not by_tiles(level, MANY):
                assert same(outputs, [y[:m] for y in all_rows]), (key, m)
        assert same(found[key].outputs[12], [y[4:5] for y in found[key].outputs[7]]), key
    for _, n, k, threads in [key for key in CASES if key[0] == "threads"]:
        one = found["codes", n, k, 1].outputs
        assert all(map(same, found["threads", n, k, threads].outputs, one)), (n, k, threads)


@each_level
def test_decoding_is_as_matmul_nbits(outcomes: Outcomes, level: str) -> None:
    found = outcomes(level)
    for n, k in [shape for shape in SHAPES if shape[0] > 1]:  # the sum of a lone column may nearly cancel
        bias = Weights.draw(n, k).bias if n == 33 else 0
        for m in range(DECODE_ROWS):
            expected = found["nbits", n, k].outputs[m][0]
            for kind in ("codes", "floats"):
                assert error(found[kind, n, k, 1].outputs[m][0], expected + bias) < 2e-6, (kind, n, k, m)


@each_level
def test_errors_are_those_of_int8_and_of_two_terms(outcomes: Outcomes, level: str) -> None:
    found = outcomes(level)
    for n, k in SHAPES:
        weights = Weights.draw(n, k)
        exact = rows(k).astype(np.float64) @ weights.matrix.T + (weights.bias if n == 33 else 0)
        for kind in ("codes", "floats"):
            for feed, (y,) in zip(CASES[kind, n, k, 1].feeds[:12], found[kind, n, k, 1].outputs, strict=False):
                m = len(feed["x"])
                scale = np.abs(rows(k)[:m]).max(axis=1, keepdims=True) * np.abs(weights.matrix).max() * k**0.5
                assert np.all(np.abs(y - exact[:m]) <= 1.5e-2 * scale), (kind, n, k, m)
            for feed, (y,) in zip(CASES[kind, n, k, 2].feeds[:12], found[kind, n, k, 2].outputs, strict=False):
                m = len(feed["x"])
                scale = np.abs(rows(k)[:m]).max(axis=1, keepdims=True) * np.abs(weights.matrix).max() * k**0.5
                assert np.all(np.abs(y - exact[:m]) <= 5e-5 * scale + 1e-6), (kind, n, k, m)


@each_level
@pytest.mark.parametrize(("activation", "gate"), GATES)
def test_activations_and_gates_are_those_of_float64(
    outcomes: Outcomes, level: str, activation: str, gate: int
) -> None:
    found = outcomes(level)
    for n, k in ((34, 160), (200, 576)):
        weights = Weights.draw(n, k)
        exact = rows(k).astype(np.float64) @ weights.matrix.T + weights.bias
        for (y,) in found["gate", activation, gate, n, k].outputs[:12]:
            with np.errstate(over="ignore"):
                expected = gated(exact[: len(y)], activation, gate)
            assert error(y, expected) < 3e-4, (n, k, len(y))


@each_level
@pytest.mark.parametrize(("norm", "skip", "beta", "summed"), NORMS)
def test_norms_are_those_of_float64(
    outcomes: Outcomes, level: str, norm: str, skip: int, beta: int, summed: int
) -> None:
    key = ("norm", norm, skip, beta, summed)
    weights = Weights.draw(34, 160)
    gamma = np.random.default_rng(7).random(160).astype(np.float32)
    for feed, outputs in zip(CASES[key].feeds, outcomes(level)[key].outputs, strict=True):
        total = feed["x"] + feed.get("skip", np.float32(0))
        normed = normalize(total, gamma, weights.bias[:1] if beta else None, norm, EPSILON)
        expected = normed @ weights.matrix.T
        assert np.abs(outputs[0] - expected).max() < 1.5e-2 * np.abs(expected).max(), len(total)
        assert not summed or np.array_equal(outputs[1], total)


@each_level
def test_nan_and_infinity_reach_every_column_of_their_row_and_no_other(outcomes: Outcomes, level: str) -> None:
    for terms in (1, 2):
        together, *alone = (outputs[0] for outputs in outcomes(level)["special", terms].outputs)
        for i, y in enumerate(alone):
            assert np.isnan(y).all() if i < 3 else np.isfinite(y).all(), (terms, i)
        assert not np.isfinite(together[:3]).any(), terms
        assert np.isfinite(together[3:]).all(), terms


@each_level
def test_no_rows_give_no_rows(outcomes: Outcomes, level: str) -> None:
    assert outcomes(level)["empty",].outputs[0][0].shape == (0, 17)

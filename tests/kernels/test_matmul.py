"""MatMulInt8 and NormMatMulInt8 against numpy, MatMulNBits and one another, at every level of this machine."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from .conftest import each_level
from .graphs import FORMS, Weights, compared, gated, matmul, matrix, nbits, norm_matmul, normalize
from .running import ARM_LEVELS, Array, Case

OF_NBITS = FORMS[:3]
SHAPES = [(n, 32 * blocks) for blocks in (1, 3, 5, 17) for n in (1, 17, 33, 70)] + [(40, 1536), (33, 256), (17, 768)]
SHAPES_OF = {form: SHAPES if form in OF_NBITS else SHAPES[1::3] + SHAPES[-2:] for form in FORMS}
THREADS = (1, 3)
MANY = 70  # rows
DECODE_ROWS = 8  # up to so many have the bits of one
EPSILON = 1e-5
THREADED = (400, 544)  # several tasks
GATES = [("silu", 0), ("silu", -1), ("gelu", 1), ("gelu", -1), ("gelu_tanh", 0), ("gelu_tanh", -1), ("", 1)]
NORMS = [*itertools.product(("rms", "layer"), (False, True), (False, True), (False, True))]  # skip, beta, summed
GAMMA = np.random.default_rng(7).random(160).astype(np.float32)
BETA = np.full(160, 0.7, np.float32)


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


def sparse(k: int) -> Array:
    """Rows with a value in each block, whose products with int8 weights are nearly exact."""
    x = np.zeros((MANY, k), np.float32)
    x[:, 5::32] = np.linspace(-12, 12, MANY)[:, None]
    return x


def first(form: str, n: int, k: int) -> tuple[dict[str, Array], dict[str, int]]:
    """The weights as they are first stored, and attributes."""
    weights = Weights.draw(n, k, form)
    return weights.named(weights.stored[0]), {"bits": weights.bits}


def cases() -> dict[Any, Case]:
    made: dict[Any, Case] = {}
    for form in FORMS:
        for n, k in SHAPES_OF[form]:
            weights = Weights.draw(n, k, form)
            made["compared", form, n, k] = Case(compared(weights, bias=n == 33), slices(rows(k)))
            if form in OF_NBITS:
                made["nbits", form, n, k] = Case(nbits(weights), slices(rows(k))[:DECODE_ROWS])
        for terms in (1, 2):
            feeds = [{"x": special(160)}, *({"x": row[None]} for row in special(160))]
            arrays, attributes = first(form, 33, 160)
            made["special", form, terms] = Case(matmul(arrays, terms=terms, **attributes), feeds)
        for gate in (-1, 0):
            for threads in THREADS:
                arrays, attributes = first(form, *THREADED)
                model = matmul(arrays, gate=gate, **attributes)
                made["threads", form, gate, threads] = Case(model, slices(rows(THREADED[1])), threads)
    for activation, gate in GATES:
        for n, k in ((34, 32), (200, 64)):
            model = matmul(Weights.draw(n, k).named(bias=True), activation=activation, gate=gate, terms=2)
            made["gate", activation, gate, n, k] = Case(model, slices(sparse(k)), threads=2)
    for i, (norm, skip, beta, summed) in enumerate(NORMS):
        arrays, attributes = first(FORMS[i % len(FORMS)], 34, 160)
        arrays |= {"gamma": GAMMA} | ({"beta": BETA} if beta else {})
        model = norm_matmul(arrays, skip=skip, beta=beta, summed=summed, norm=norm, epsilon=EPSILON, **attributes)
        feeds = [feed | ({"skip": feed["x"][:, ::-1].copy() * 0.5} if skip else {}) for feed in slices(rows(160))]
        made["norm", norm, skip, beta, summed] = Case(model, feeds)
    return made


CASES = cases()


each_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def outcomes(run):
    """The outcomes of all cases at a level, run once."""

    @functools.cache
    def once(level):
        found = run(level, CASES)
        assert [outcome.error for outcome in found.values() if outcome.error] == []
        return found

    return once


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
def test_every_level_gives_the_bits_of_the_reference(outcomes, level):
    found, reference = outcomes(level), outcomes("portable")
    for key, case in CASES.items():
        if key[0] == "nbits":  # onnxruntime's own, whose sums may differ by level
            continue
        for feed, ours, theirs in zip(case.feeds, found[key].outputs, reference[key].outputs, strict=True):
            if not by_tiles(level, len(feed["x"])):
                assert same(ours, theirs), (key, len(feed["x"]))


@each_level
def test_a_row_has_the_same_bits_among_others(outcomes, level):
    found = outcomes(level)
    for key in CASES:
        if key[0] in ("special", "nbits"):
            continue
        outputs = found[key].outputs
        alone = [[y[i : i + 1] for i in range(len(y))] for y in outputs[7]]  # of 8 rows
        assert same(outputs[12], [y[4] for y in alone]), key
        for m in range(1, 9):
            assert same(outputs[m - 1], [y[:m] for y in outputs[7]]), (key, m)
        whole = outputs[11]
        for m, few in [(9, outputs[8]), (31, outputs[9]), (33, outputs[10])]:
            assert same(few, [y[:m] for y in whole]), (key, m)
        if not by_tiles(level, MANY):
            assert same(outputs[7], [y[:8] for y in whole]), key


@each_level
def test_bits_are_the_same_for_any_number_of_threads(outcomes, level):
    found = outcomes(level)
    for form in FORMS:
        for gate in (-1, 0):
            one, *more = (found["threads", form, gate, threads].outputs for threads in THREADS)
            for others in more:
                assert all(map(same, others, one)), (form, gate)


@each_level
@pytest.mark.parametrize("form", OF_NBITS)
def test_decoding_is_as_matmul_nbits(outcomes, level, form):
    if level in ARM_LEVELS and form == "int4 without zero points":
        pytest.skip("onnxruntime's kernel for ARM rounds X in another way here")
    found = outcomes(level)
    for n, k in [shape for shape in SHAPES if shape[0] > 1]:  # the sum of a lone column may nearly cancel
        weights = Weights.draw(n, k, form)
        bias, float32 = weights.bias if n == 33 else 0, 2 * weights.stored.index("float32")
        ours = found["compared", form, n, k].outputs[:DECODE_ROWS]
        for (expected,), outputs in zip(found["nbits", form, n, k].outputs, ours, strict=True):
            for y in (outputs[0], outputs[float32]):
                assert error(y, expected + bias) < 2e-6, (n, k, len(y))


@each_level
@each_form
def test_errors_are_those_of_int8_and_of_two_terms(outcomes, level, form):
    found = outcomes(level)
    for n, k in SHAPES_OF[form]:
        weights, x = Weights.draw(n, k, form), rows(k)
        for i, stored in enumerate(weights.stored):
            dense = matrix(weights.named(stored))
            exact = x.astype(np.float64) @ dense.T + (weights.bias if n == 33 else 0)
            scale = np.abs(x).max(axis=1, keepdims=True) * np.abs(dense).max() * k**0.5
            for outputs in found["compared", form, n, k].outputs[:12]:
                for y, tolerance in zip(outputs[2 * i : 2 * i + 2], (1.5e-2, 5e-5), strict=True):
                    m = len(y)
                    assert np.all(np.abs(y - exact[:m]) <= tolerance * scale[:m] + 1e-6), (stored, n, k, m, tolerance)


@each_level
@pytest.mark.parametrize(("activation", "gate"), GATES)
def test_activations_and_gates_are_those_of_float64(outcomes, level, activation, gate):
    found = outcomes(level)
    for n, k in ((34, 32), (200, 64)):
        weights, x = Weights.draw(n, k), sparse(k)
        product = x.astype(np.float64) @ matrix(weights.named()).T + weights.bias
        for (y,) in found["gate", activation, gate, n, k].outputs[:12]:
            expected = gated(product[: len(y)], activation, gate)
            assert error(y, expected) < (5e-5 if by_tiles(level, len(y)) else 3e-6), (n, k, len(y))


@each_level
@pytest.mark.parametrize(("norm", "skip", "beta", "summed"), NORMS)
def test_norms_are_those_of_float64(outcomes, level, norm, skip, beta, summed):
    key = ("norm", norm, skip, beta, summed)
    arrays, _ = first(FORMS[NORMS.index(key[1:]) % len(FORMS)], 34, 160)
    for feed, outputs in zip(CASES[key].feeds, outcomes(level)[key].outputs, strict=True):
        total = feed["x"] + feed.get("skip", np.float32(0))
        normed = normalize(total, GAMMA, BETA if beta else None, norm, EPSILON)
        expected = normed @ matrix(arrays).T
        assert np.abs(outputs[0] - expected).max() < 1.5e-2 * np.abs(expected).max(), len(total)
        assert not summed or np.array_equal(outputs[1], total)


@each_level
@each_form
def test_nan_and_infinity_reach_every_column_of_their_row_and_no_other(outcomes, level, form):
    for terms in (1, 2):
        together, *alone = (outputs[0] for outputs in outcomes(level)["special", form, terms].outputs)
        for i, y in enumerate(alone):
            assert np.isnan(y).all() if i < 3 else np.isfinite(y).all(), (terms, i)
        assert not np.isfinite(together[:3]).any(), terms
        assert np.isfinite(together[3:]).all(), terms

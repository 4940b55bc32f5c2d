"""Decoding with an int8 cache after a long text: the same model, in less memory, and back again."""

from __future__ import annotations

import numpy as np
import pytest

from pastkey.runtime.engine.caches import int8_kv
from pastkey.runtime.engine.engine import Engine
from pastkey.runtime.providers import ort
from pastkey.values import parse_version

IDS = np.random.default_rng(0).integers(0, 37, 80)

pytestmark = pytest.mark.skipif(
    parse_version(ort.onnxruntime.__version__) < parse_version(int8_kv.MIN_ONNXRUNTIME),
    reason="this onnxruntime has no int8 cache",
)


@pytest.fixture(scope="module")
def bundle(tiny, make_bundle):
    return make_bundle(tiny, "fused", int8_kv=True)


@pytest.fixture
def engine(bundle):
    """Every token that is decoded goes through the int8 cache."""
    return Engine(bundle, threads=1, int8_kv_from=1)


@pytest.fixture
def exact(bundle):
    return Engine(bundle, threads=1, int8_kv_from=None)


def decoded(engine: Engine, first: int = 20) -> np.ndarray:
    engine.reset()
    engine.prefill(IDS[:first])
    return np.stack([engine.decode(int(token)) for token in IDS[first:]])


def lengths(engine: Engine) -> tuple[int, int, int]:
    int8 = engine.cache.int8
    return engine.length, engine.cache.float32.length, 0 if int8 is None else int8.length


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Within what an int8 cache costs, and not equal: another cache it was."""
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < difference < 0.05


def test_decoding_goes_through_the_int8_cache_from_a_length_on(bundle, exact):
    found, expected = decoded(Engine(bundle, threads=1, int8_kv_from=30)), decoded(exact)
    np.testing.assert_array_equal(found[:10], expected[:10])  # tokens 20 to 29
    assert_close(found[10:], expected[10:])


def test_prefill_after_int8_decoding(engine, exact):
    """Several tokens at once go through the float32 cache, which gets the rows that only the other one had."""
    engine.prefill(IDS[:20])
    for token in IDS[20:40].tolist():
        engine.decode(token)
    assert lengths(engine) == (40, 20, 40)
    found = engine.prefill(IDS[40:])
    assert lengths(engine) == (80, 80, 40)
    assert_close(found, exact.prefill(IDS))
    assert_close(engine.decode(3), exact.decode(3))
    assert lengths(engine) == (81, 80, 81)


def test_an_older_onnxruntime_decodes_without_it(bundle, exact, monkeypatch):
    monkeypatch.setattr(int8_kv, "MIN_ONNXRUNTIME", "999.0.0")
    np.testing.assert_array_equal(decoded(Engine(bundle, threads=1, int8_kv_from=1)), decoded(exact))

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from pastkey.errors import InputError
from pastkey.runtime.engine.caches.kv import GROWTH_STEP
from pastkey.runtime.engine.engine import Engine

from ...conftest import Tiny

ROW_BYTES = 4 * 2 * (8 + 8 + 16 + 16)  # float32, two kv heads, keys and values of two attention calls


def expected_keys_and_values(tiny: Tiny, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of the first attention call, (K, T, D): nothing stands before it but the embedding."""
    x = tiny.weights["embedding"][ids] + tiny.weights["position"][: len(ids)]
    keys, values = ((x @ tiny.weights[name]).reshape(len(ids), 2, 8).transpose(1, 0, 2) for name in ("wk0", "wv0"))
    return keys, values


@pytest.fixture
def session(bundle):
    return Engine(bundle, threads=1)


def test_rows_are_the_keys_and_values_of_the_tokens(session, tiny):
    session.prefill([3, 1, 4])
    session.decode(1)
    keys, values, later, _ = session.cache.rows(4)
    assert keys.shape == values.shape == (1, 2, 4, 8)
    for found, expected in zip((keys, values), expected_keys_and_values(tiny, [3, 1, 4, 1]), strict=True):
        np.testing.assert_allclose(found[0], expected, atol=1e-5)
    assert later.shape == (1, 2, 4, 16)


def test_a_shared_buffer_grows_in_steps_up_to_the_context(fused_bundle):
    session = Engine(fused_bundle, threads=1)
    assert session.cache.capacity == session.cache.nbytes == 0
    capacities = []
    for _ in range(600):
        session.decode(1)
        capacities.append(session.cache.capacity)
    assert capacities[0] == GROWTH_STEP
    assert sorted(set(capacities)) == [128, 256, 384, 512, 600]
    assert capacities[127:129] == [128, 256]
    assert session.cache.nbytes == 600 * ROW_BYTES


def test_the_concatenating_form_holds_what_there_is(standard_bundle):
    session = Engine(standard_bundle, threads=1)
    session.prefill([1, 2, 3])
    for length, rows in ((3, 3), (2, 2), (0, 0)):
        session.trim(length)
        assert session.cache.nbytes == rows * ROW_BYTES


@pytest.mark.parametrize("length", [-1, 4, 1.5])
def test_trim_to_what_is_not_there_is_refused(session, tiny, length):
    session.prefill([1, 2, 3])
    with pytest.raises(InputError, match=r"holds 3 tokens|length is 1\.5; it must be a whole number"):
        session.trim(length)
    session.trim(3)
    assert session.length == 3
    session.trim(0)  # another number of rows fits
    np.testing.assert_allclose(session.forward([[5], [6]])[1, 0], tiny([6])[0], atol=1e-5)
    assert session.cache.nbytes == 2 * session.cache.capacity * ROW_BYTES


def test_the_cache_is_dropped_before_its_session(bundle):
    """On WebGPU, the other order is a segmentation fault."""
    engine = Engine(bundle, threads=1)
    engine.prefill([1, 2, 3])
    engine.decode(4)
    cache, dropped = engine.cache, list[str]()
    for value in cache._values:
        weakref.finalize(value, dropped.append, "value")
    weakref.finalize(cache.binding, dropped.append, "binding")
    weakref.finalize(engine.onnx, dropped.append, "session")
    del value, cache, engine
    gc.collect()
    assert sorted(dropped[:-1]) == ["binding", *["value"] * 4]
    assert dropped[-1] == "session"

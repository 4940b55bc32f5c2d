"""What a cache holds, how it grows and shrinks, and when it goes."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from pastkey.errors import InputError
from pastkey.runtime import Engine
from pastkey.runtime.engine.caches.kv import GROWTH_STEP

from ...conftest import require_close

ROW_BYTES = 4 * 2 * (8 + 8 + 16 + 16)  # float32, two kv heads, keys and values of two attention calls


@pytest.mark.parametrize(("graph", "fields"), [("fused", {}), ("standard", {}), ("static", {"chunk": 2})])
def test_rows_are_the_keys_and_values_of_the_tokens(graph, fields, tiny, make_bundle):
    """Of the first attention call: nothing stands before it but the embedding."""
    session = Engine(make_bundle(tiny, graph, **fields), threads=1)
    assert session.cache.nbytes == 0
    session.prefill([3, 1, 4])
    session.decode(1)
    keys, values, later, _ = session.cache.rows(4)
    x = tiny.weights["embedding"][[3, 1, 4, 1]] + tiny.weights["position"][:4]
    for found, name in ((keys, "wk0"), (values, "wv0")):
        np.testing.assert_allclose(found[0], (x @ tiny.weights[name]).reshape(4, 2, 8).swapaxes(0, 1), atol=1e-5)
    assert later.shape == (1, 2, 4, 16)
    assert session.cache.nbytes == {"fused": GROWTH_STEP, "standard": 4, "static": 600}[graph] * ROW_BYTES


def test_a_shared_buffer_grows_in_steps_up_to_the_context(fused_bundle):
    session, capacities = Engine(fused_bundle, threads=1), []
    for _ in range(600):
        session.decode(1)
        capacities.append(session.cache.capacity)
    assert sorted(set(capacities)) == [128, 256, 384, 512, 600]
    assert capacities[126:129] == [128, 128, 256]
    assert session.cache.nbytes == 600 * ROW_BYTES


def test_the_concatenating_form_holds_what_there_is(standard_bundle):
    session = Engine(standard_bundle, threads=1)
    session.prefill([1, 2, 3])
    for length, rows in ((3, 3), (2, 2), (0, 0)):
        session.trim(length)
        assert session.cache.nbytes == rows * ROW_BYTES


@pytest.mark.parametrize("length", [-1, 4, 1.5])
def test_trim_to_what_is_not_there_is_refused(engine, tiny, length):
    engine.prefill([1, 2, 3])
    with pytest.raises(InputError, match=r"holds 3 tokens|length is 1\.5; it must be a whole number"):
        engine.trim(length)
    engine.trim(3)
    assert engine.length == 3
    engine.trim(0)  # another number of rows fits
    require_close(engine.forward([[5], [6]])[1, 0], tiny([6])[0])
    assert engine.cache.nbytes == 2 * engine.cache.capacity * ROW_BYTES


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

"""Each cache computes the same as one uncached pass; its content, growth, cuts, and release."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pastkey.errors import InputError
from pastkey.providers import PROVIDERS
from pastkey.runtime import Engine
from pastkey.runtime.engine.caches.capacity import GROWTH_STEP
from pastkey.runtime.engine.caches.fixed import FixedKVCache
from pastkey.runtime.engine.caches.kv import KVCache
from pastkey.runtime.engine.caches.static_graphs import StaticGraphs
from pastkey.runtime.providers.ort import onnxruntime

from ...conftest import require_close, stopped
from ...rotary import RotaryTiny

# graph, fields of the bundle, class of the cache
FORMS: dict[str, tuple[str, dict[str, Any], type]] = {
    "fused": ("fused", {}, KVCache),
    "standard": ("standard", {}, KVCache),
    "static": ("static", {"chunk": 4}, StaticGraphs),
    "fixed": ("standard", {}, FixedKVCache),
    "window of 24": ("fused", {"window": 24}, KVCache),
    "window of 8 in one call": ("fused", {"window": 8, "local": (1,)}, KVCache),
    "standard, window of 8": ("standard", {"window": 8}, KVCache),
}
STEPS = st.one_of(
    st.tuples(st.just("prefill"), st.sampled_from([1, 2, 30, 130])),
    st.tuples(st.just("decode"), st.integers(1, 6)),
    st.tuples(st.sampled_from(["trim", "keep", "copy"]), st.floats(0, 1)),
    st.tuples(st.sampled_from(["reset", "interrupt"]), st.none()),
)


@pytest.fixture(scope="module", params=FORMS)
def form(request, tiny, make_bundle):
    """An engine and the decoder."""
    graph, fields, kind = FORMS[request.param]
    decoder, write = tiny, functools.partial(make_bundle, tiny)
    if "window" in fields:
        decoder = RotaryTiny.of(16, 600, pairs=8, inside=graph == "fused", **fields)
        write, fields = functools.partial(decoder.written, make_bundle), {}
    with pytest.MonkeyPatch.context() as patch:
        if kind is FixedKVCache:
            patch.setitem(PROVIDERS, "cpu", dataclasses.replace(PROVIDERS["cpu"], fixed_shapes=True))
        engine = Engine(write(graph, **fields), threads=1)
        engine.marks = True
        assert isinstance(engine.cache, kind)
        yield engine, decoder


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, min_size=3, max_size=9), seed=st.integers(0, 99))
def test_every_way_through_a_cache_equals_the_uncached_pass(form, steps, seed):
    engine, decoder = form
    engine.reset()
    rng, ids, exact = np.random.default_rng(seed), list[int](), 0  # `exact` first tokens came by a prefill
    for step, size in [*steps, ("prefill", 5), ("decode", 1)]:
        if step == "prefill":
            new = rng.integers(0, 37, min(size, 590 - len(ids))).tolist()
            exact += len(new) if len(new) > 1 and exact == len(ids) else 0
            ids += new
            require_close(engine.prefill(new, chunk_size=64), decoder(ids)[-1])
        elif step == "decode":
            for token in rng.integers(0, 37, size).tolist():
                ids.append(token)
                require_close(engine.decode(token), decoder(ids)[-1])
        elif step == "reset":
            engine.reset()
            ids.clear()
        elif step == "interrupt":  # in a trim, a growth, or behind a run: the cache is empty
            with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
                patch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", stopped)
                patch.setattr(engine.graph, "check_finite", stopped)
                if engine.can_trim(len(ids) // 2):
                    engine.trim(len(ids) // 2)
                engine.append([1, 2, 3])
            ids.clear()
            assert (engine.length, engine.nbytes) == (0, 0)
        elif engine.can_trim(length := int(size * len(ids))):
            if step == "trim":
                engine.trim(length)
            elif step == "copy":
                engine = engine.copy(length, room=3)
            else:
                assert engine.keep_prefix([*ids[:length], 36, 36]) == length
            del ids[length:]
        exact = min(exact, len(ids))
        assert (engine.length, engine.exact_length) == (len(ids), exact)
        assert engine.cached_ids == ids


# --- rows and bytes -------------------------------------------------------------------------------------------------
ROW_BYTES = 4 * 2 * (8 + 8 + 16 + 16)  # float32, two kv heads, keys and values of two attention calls


@pytest.mark.parametrize(("graph", "fields"), [("fused", {}), ("standard", {}), ("static", {"chunk": 2})])
def test_rows_are_the_keys_and_values_of_the_tokens(graph, fields, tiny, make_bundle):
    """Of the first attention call: only the embedding is before it."""
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
        capacities.append(session.cache.arrays[0].shape[2])
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
    assert engine.cache.rows(1)[0].shape[0] == 2


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

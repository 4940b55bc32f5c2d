"""Each cache computes what one uncached pass computes: appended to, trimmed, kept, copied and interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pastkey.providers import PROVIDERS
from pastkey.runtime import Engine
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
    "window": ("fused", {"window": 24}, KVCache),
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
    local = RotaryTiny.of(16, 600, pairs=8, inside=True, window=24)
    decoder, fields = (local, {**fields, "shift": local.shift}) if "window" in fields else (tiny, fields)
    with pytest.MonkeyPatch.context() as patch:
        if kind is FixedKVCache:
            patch.setitem(PROVIDERS, "cpu", dataclasses.replace(PROVIDERS["cpu"], fixed_shapes=True))
        engine = Engine(make_bundle(decoder, graph, **fields), threads=1)
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

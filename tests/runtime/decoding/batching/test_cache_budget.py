from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from pastkey.contract.bundle import Bundle
from pastkey.errors import ResourceError
from pastkey.runtime import Engine
from pastkey.runtime.decoding.batching.cache_budget import CacheMemory
from pastkey.runtime.decoding.batching.prefix_cache import PrefixStore
from pastkey.runtime.engine.caches.kv import GROWTH_STEP
from pastkey.runtime.engine.decoder_graph import DecoderGraph

from ...rotary import RotaryTiny

MakeBundle = Callable[..., Bundle]


def test_stored_prefixes_make_room_and_caches_in_use_do_not(fused_bundle):
    engine = Engine(fused_bundle, threads=1)
    store = PrefixStore(engine.graph)
    memory = CacheMemory(engine.graph, [store], 300 * engine.graph.bytes_per_token)
    for token in (1, 2):
        kept = Engine.over(engine.graph)
        kept.prefill([token] * 10)
        store.put(kept)
    assert (len(store), store.nbytes) == (2, 2 * memory.estimate(128))
    memory.promise(engine, 100)
    assert len(store) == 1
    other = Engine.over(engine.graph)
    with pytest.raises(ResourceError, match="the cache of 201 tokens takes"):
        memory.promise(other, 201)
    memory.promise(other, 200)
    assert len(store) == 0
    memory.promise(other, 150)  # it asks anew
    memory.release(other)
    memory.promise(Engine.over(engine.graph), 200)
    assert memory.estimate(10**9) == memory.estimate(600)


def test_without_a_limit_everything_fits(fused_bundle):
    engine = Engine(fused_bundle, threads=1)
    memory = CacheMemory(engine.graph, [PrefixStore(engine.graph)], None)
    memory.promise(engine, 10**12)


@pytest.mark.parametrize(
    ("graph", "fields", "tokens", "rows"),
    [
        ("fused", {}, 100, 100),
        ("fused", {}, 5000, 1000),
        ("standard", {}, 100, 2 * 100),  # a run holds the cache before and after it
        ("static", {"chunk": 8}, 100, 1000),
        ("fused", {"window": 24}, 1000, 24 + 16 + 256),
    ],
)
def test_what_a_cache_takes(graph, fields, tokens, rows, make_bundle):
    tiny = RotaryTiny.of(16, 1000, pairs=8, inside=graph == "fused")
    opened = DecoderGraph(make_bundle(tiny, graph, shift=tiny.shift, **fields), threads=1)
    assert opened.cache_bytes(tokens) == rows * opened.bytes_per_token


def test_the_cache_is_no_larger_than_was_estimated(make_bundle):
    tiny = RotaryTiny.of(16, 1000, pairs=8, inside=True)
    for fields in ({}, {"window": 24}):
        bundle = make_bundle(tiny, "fused", shift=tiny.shift, **fields)
        engine = Engine(bundle, threads=1)
        engine.prefill([1] * 600)
        for token in range(8):
            engine.decode(token)
        room = engine.graph.bytes_per_token * 3 * GROWTH_STEP  # that is reserved, and not written
        assert engine.nbytes <= engine.graph.cache_bytes(608) + room


@pytest.mark.parametrize("window", [None, 24])
def test_memory_is_flat_but_for_the_cache(window, make_bundle):
    tiny = RotaryTiny.of(16, 8192, layers=1, pairs=8, inside=True, window=window or 0)
    bundle = make_bundle(tiny, "fused", shift=tiny.shift, window=window)
    beside = {}
    for tokens in (1000, 8000):
        engine, ids = Engine(bundle, threads=1), np.arange(tokens) % 37
        tracemalloc.start()
        engine.prefill(ids)
        beside[tokens] = tracemalloc.get_traced_memory()[1] - engine.nbytes
        tracemalloc.stop()
    per_token = (beside[8000] - beside[1000]) / 7000
    assert per_token < 100  # ids, positions and a mask; keys and values take 256 bytes in this decoder

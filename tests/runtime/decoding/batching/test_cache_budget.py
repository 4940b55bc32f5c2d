"""The memory of caches, its limit, and prefixes that are kept: the nearest is found, the oldest removed."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from pastkey.errors import ResourceError
from pastkey.runtime import Engine
from pastkey.runtime.decoding.batching.cache_budget import CacheMemory
from pastkey.runtime.decoding.batching.prefix_cache import PrefixStore
from pastkey.runtime.engine.caches.capacity import GROWTH_STEP
from pastkey.runtime.engine.decoder_graph import DecoderGraph

from ...conftest import ids_of, require_close
from ...rotary import RotaryTiny


def filled(engine: Engine, ids: list[int], *, decoded: int = 0) -> Engine:
    made = Engine.over(engine.graph)
    made.prefill(ids[: len(ids) - decoded])
    for token in ids[len(ids) - decoded :]:
        made.decode(token)
    return made


# --- the limit ----------------------------------------------------------------------------------------------------
def test_stored_prefixes_make_room_and_caches_in_use_do_not(fused_bundle):
    engine = Engine(fused_bundle, threads=1)
    store = PrefixStore(engine.graph)
    memory = CacheMemory(engine.graph, [store], 300 * engine.graph.bytes_per_token)
    for token in (1, 2):
        store.put(filled(engine, [token] * 10))
    assert (len(store), store.nbytes) == (2, 2 * memory.estimate(128))
    memory.promise(engine, 100)
    assert len(store) == 1
    other = Engine.over(engine.graph)
    with pytest.raises(ResourceError, match="the cache of 201 tokens needs"):
        memory.promise(other, 201)
    memory.promise(other, 200)
    assert len(store) == 0
    memory.promise(other, 150)  # it asks anew
    memory.release(other)
    memory.promise(Engine.over(engine.graph), 200)
    assert memory.estimate(10**9) == memory.estimate(600)
    CacheMemory(engine.graph, [store], None).promise(engine, 10**12)  # without a limit everything fits


LOCAL: dict[str, Any] = {"window": 24}


@pytest.mark.parametrize(
    ("graph", "fields", "tokens", "rows"),
    [
        ("fused", {}, 100, 100),
        ("fused", {}, 5000, 1000),
        ("standard", {}, 100, 2 * 100),  # a run holds the cache before and after it
        ("static", {}, 100, 1000),
        ("fused", LOCAL, 1000, 384 + 2 * 24),  # a window, tokens to trim, and a chunk; two marks
        ("fused", {**LOCAL, "local": (1,)}, 1000, (1000 + 384 + 2 * 24) / 2),
    ],
)
def test_what_a_cache_takes(graph, fields, tokens, rows, make_bundle):
    tiny = RotaryTiny.of(16, 1000, pairs=8, inside=graph == "fused", **fields)
    opened = DecoderGraph(tiny.written(make_bundle, graph, **({"chunk": 8} if graph == "static" else {})), threads=1)
    assert opened.cache_bytes(tokens) == rows * opened.bytes_per_token


@pytest.mark.parametrize("fields", [{}, LOCAL])
def test_memory_is_the_cache_that_was_estimated_and_little_beside_it(fields, make_bundle):
    bundle = RotaryTiny.of(16, 8192, layers=1, pairs=8, inside=True, **fields).written(make_bundle)
    beside = {}
    for tokens in (1000, 8000):
        engine, ids = Engine(bundle, threads=1), ids_of(tokens)
        tracemalloc.start()
        engine.prefill(ids)
        beside[tokens] = tracemalloc.get_traced_memory()[1] - engine.nbytes
        tracemalloc.stop()
        room = engine.graph.bytes_per_token * 3 * GROWTH_STEP  # that is reserved, and not written
        assert engine.nbytes <= engine.graph.cache_bytes(tokens) + room
    per_token = (beside[8000] - beside[1000]) / 7000
    assert per_token < 100  # ids, positions and a mask; keys and values need 256 bytes in this decoder


# --- prefixes -----------------------------------------------------------------------------------------------------
A, B = [1] * 20 + list(range(2, 30)), [1] * 20 + list(range(30, 2, -1))


def test_the_nearest_is_taken_and_the_rest_equals_a_fresh_prefill(engine, tiny):
    store = PrefixStore(engine.graph)
    for ids in (A[:30], A, B, [5, 6, 7]):  # a longer text replaces its beginning
        store.put(filled(engine, ids))
    assert len(store) == 3
    for prompt, shared in (([*A, 8, 9], 48), ([*B[:30], 8, 9], 30), ([9, 9, 9], 0), ([5, 6], 0)):
        found, cached = store.take(prompt)
        assert cached == shared == found.length
        require_close(found.prefill(prompt[cached:]), tiny(prompt)[-1])


def test_one_that_is_shared_in_part_stays_for_others(engine):
    store = PrefixStore(engine.graph)
    store.put(filled(engine, A))
    one, other = store.take([*A[:20], 3, 3])[0], store.take([*A[:20], 4, 4])[0]
    assert one is not other
    assert len(store) == 1
    assert store.take([*A, 1, 1])[1] == len(A)
    assert len(store) == 0


def test_the_least_recently_used_goes_first(engine):
    size, other = filled(engine, A).nbytes, [7] * 48
    store, small = PrefixStore(engine.graph, 2 * size), PrefixStore(engine.graph, size - 1)
    store.put(filled(engine, A))
    store.put(filled(engine, B))
    store.take([*A[:30], 1, 2])  # used
    store.put(filled(engine, other))
    assert store.nbytes <= 2 * size
    for ids, shared in ((B, 20), (A, 48), (other, 48)):  # the beginning that B shares with A
        assert store.take([*ids, 1, 2])[1] == shared
    store.put(filled(engine, A))
    store.shrink(size - 1)
    small.put(filled(engine, A))
    assert len(store) == len(small) == 0


def test_of_calls_that_keep_nothing_the_last_stays(engine):
    store, last = PrefixStore(engine.graph), filled(engine, B)
    store.put(filled(engine, A), reuse=False)
    store.put(last, reuse=False)
    assert len(store) == 1
    assert store.take(A, reuse=False) == (last, 0)
    assert last.length == 0


def test_exact_reuses_prefilled_tokens_only(engine):
    store = PrefixStore(engine.graph)
    store.put(filled(engine, A, decoded=18))
    assert store.take([*A, 1, 2], exact=True)[1] == 30
    assert store.take([*A, 1, 2])[1] == 48

from __future__ import annotations

import pytest

from pastkey.bundle import Bundle
from pastkey.errors import ResourceError
from pastkey.runtime import Engine
from pastkey.runtime.batching.memory import CacheMemory
from pastkey.runtime.batching.prefix_store import PrefixStore


def test_stored_prefixes_make_room_and_caches_in_use_do_not(fused_bundle: Bundle) -> None:
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


def test_without_a_limit_everything_fits(fused_bundle: Bundle) -> None:
    engine = Engine(fused_bundle, threads=1)
    memory = CacheMemory(engine.graph, [PrefixStore(engine.graph)], None)
    memory.promise(engine, 10**12)

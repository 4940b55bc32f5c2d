"""Several prefixes at once: the nearest is found, the oldest goes."""

from __future__ import annotations

import numpy as np
import pytest

from pastkey.runtime import Engine, load
from pastkey.runtime.decoding.batching.prefix_cache import PrefixStore


@pytest.fixture
def engine(bundle):
    return Engine(bundle, threads=1)


def filled(engine: Engine, ids: list[int], *, decoded: int = 0) -> Engine:
    made = Engine.over(engine.graph)
    made.prefill(ids[: len(ids) - decoded])
    for token in ids[len(ids) - decoded :]:
        made.decode(token)
    return made


A, B = [1] * 20 + list(range(2, 30)), [1] * 20 + list(range(30, 2, -1))


def test_the_nearest_is_taken_and_the_rest_equals_a_fresh_prefill(engine, tiny):
    store = PrefixStore(engine.graph)
    for ids in (A[:30], A, B, [5, 6, 7]):  # a longer text takes the place of its beginning
        store.put(filled(engine, ids))
    assert len(store) == 3
    for prompt, shared in (([*A, 8, 9], 48), ([*B[:30], 8, 9], 30), ([9, 9, 9], 0), ([5, 6], 0)):
        found, cached = store.take(prompt)
        assert cached == shared == found.length
        np.testing.assert_allclose(found.prefill(prompt[cached:]), tiny(prompt)[-1], atol=1e-4)


def test_one_that_is_shared_in_part_stays_for_others(engine):
    store = PrefixStore(engine.graph)
    store.put(filled(engine, A))
    one, other = store.take([*A[:20], 3, 3])[0], store.take([*A[:20], 4, 4])[0]
    assert one is not other
    assert len(store) == 1
    assert store.take([*A, 1, 1])[1] == len(A)
    assert len(store) == 0


def test_the_least_recently_used_goes_first(engine):
    size = filled(engine, A).nbytes
    store = PrefixStore(engine.graph, 2 * size)
    other = [7] * 48
    store.put(filled(engine, A))
    store.put(filled(engine, B))
    store.take([*A[:30], 1, 2])  # used
    store.put(filled(engine, other))
    assert store.nbytes <= 2 * size
    assert store.take([*B, 1, 2])[1] == 20  # what it shares with A
    assert store.take([*A, 1, 2])[1] == 48
    assert store.take([*other, 1, 2])[1] == 48
    store.put(filled(engine, A))
    store.shrink(size - 1)
    assert len(store) == 0
    small = PrefixStore(engine.graph, size - 1)
    small.put(filled(engine, A))
    assert len(small) == 0


def test_of_calls_that_keep_nothing_the_last_stays(engine):
    store = PrefixStore(engine.graph)
    store.put(filled(engine, A), reuse=False)
    last = filled(engine, B)
    store.put(last, reuse=False)
    assert len(store) == 1
    assert store.take(A, reuse=False) == (last, 0)
    assert last.length == 0


def test_exact_reuses_prefilled_tokens_only(engine):
    store = PrefixStore(engine.graph)
    store.put(filled(engine, A, decoded=18))
    assert store.take([*A, 1, 2], exact=True)[1] == 30
    assert store.take([*A, 1, 2])[1] == 48


# --- by way of a model --------------------------------------------------------------------------------------------
def test_requests_in_between_evict_no_conversation(speaking_bundle):
    model = load(speaking_bundle.path, threads=1)
    text = "once upon a time"
    for number in range(4):
        completion = model.generate(text, reuse_prefix=True, max_new_tokens=10)
        assert completion.cached_tokens == (0 if not number else len(text) - 6)
        for title in ("give a title", "some tags"):
            model.generate(title, reuse_prefix=True, max_new_tokens=3)
        text += completion.text + " more"

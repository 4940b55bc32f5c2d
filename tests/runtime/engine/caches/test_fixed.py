"""A cache of fixed shapes with holes: several rows, the end of the context, and which graphs get it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pastkey.contract.bundle import KVGeometry, StateGeometry
from pastkey.errors import InputError
from pastkey.providers import PROVIDERS
from pastkey.runtime.engine.caches.fixed import FixedKVCache, FixedRows
from pastkey.runtime.engine.caches.kv import GROWTH_STEP, KVCache
from pastkey.runtime.engine.engine import Engine

from ...conftest import ids_of, require_close


@pytest.fixture(autouse=True)
def prefers_fixed_shapes(monkeypatch):
    """The processor in the place of a provider that does."""
    monkeypatch.setitem(PROVIDERS, "cpu", dataclasses.replace(PROVIDERS["cpu"], fixed_shapes=True))


@pytest.fixture
def fixed(standard_bundle):
    engine = Engine(standard_bundle, threads=1, graph="all_logits")
    assert isinstance(engine.cache, FixedKVCache)
    return engine


def test_rows_with_padding_equal_each_row_alone_after_a_reset(fixed, tiny):
    ids = np.array(ids_of(8))
    fixed.prefill(ids_of(30))
    fixed.reset()
    mask = np.array([[1, 1, 1, 1], [0, 1, 1, 0]])
    fixed.forward(np.where(mask, ids.reshape(2, 4), 0), mask)
    found = fixed.forward([[1], [2]])
    require_close(found[:, -1], np.stack([tiny([*ids[:4], 1])[-1], tiny([*ids[5:7], 2])[-1]]))
    with pytest.raises(InputError, match="the cache holds 2 rows and 1 were given"):
        fixed.decode(1)


def test_the_last_rows_of_the_context_are_used(make_bundle, tiny_odd):
    engine = Engine(make_bundle(tiny_odd, "standard"), threads=1)
    ids = ids_of(tiny_odd.context_length)
    engine.prefill(ids[:-1])
    require_close(engine.decode(ids[-1]), tiny_odd(ids)[-1])
    assert engine.cache.capacity == tiny_odd.context_length


@pytest.mark.parametrize("fields", [{"padding": False}, {"states": (StateGeometry(3, 4),)}])
def test_where_a_hole_is_no_padding_the_cache_concatenates(fields, fixed):
    fixed.graph.manifest = dataclasses.replace(fixed.graph.manifest, **fields)
    assert isinstance(fixed.graph.new_cache(), KVCache)


def test_fixed_rows_say_what_they_cannot():
    rows = FixedRows([KVGeometry(2, 4, 6)], context_length=300)
    with pytest.raises(InputError, match="holds 0 tokens and cannot be trimmed to 1"):
        rows.trim(1)
    rows.grow(1, 5)
    assert (rows.capacity, rows.nbytes) == (GROWTH_STEP, 4 * GROWTH_STEP * 2 * (4 + 6))
    rows.grow(1, 299)
    assert rows.capacity == 300

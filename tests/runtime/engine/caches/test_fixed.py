"""Caches of fixed shapes with holes: of a standard graph, and of static graphs of one token and of a chunk."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pastkey.contract.bundle import KVGeometry, RowsGeometry, StaticShape
from pastkey.errors import InputError, IntegrityError
from pastkey.providers import PROVIDERS
from pastkey.runtime import Engine
from pastkey.runtime.engine.caches.capacity import GROWTH_STEP
from pastkey.runtime.engine.caches.fixed import FixedKVCache, FixedRows
from pastkey.runtime.engine.caches.kv import KVCache
from pastkey.runtime.engine.caches.static_graphs import visible_columns

from ...conftest import ids_of, require_close

IDS = ids_of(24)
CHUNK = 4


@pytest.fixture(autouse=True)
def prefers_fixed_shapes(monkeypatch):
    """The processor instead of a provider that does."""
    monkeypatch.setitem(PROVIDERS, "cpu", replace(PROVIDERS["cpu"], fixed_shapes=True))


@pytest.fixture
def fixed(standard_bundle):
    engine = Engine(standard_bundle, threads=1, graph="all_logits")
    assert isinstance(engine.cache, FixedKVCache)
    return engine


def test_rows_with_padding_equal_each_row_alone_after_a_reset(fixed, tiny):
    ids = np.array(ids_of(8))
    fixed.prefill(ids_of(125))
    require_close(fixed.prefill(ids), tiny([*ids_of(125), *ids])[-1])  # which grows behind what it holds
    fixed.reset()
    mask = np.array([[1, 1, 1, 1], [0, 1, 1, 0]])
    fixed.forward(np.where(mask, ids.reshape(2, 4), 0), mask)
    found = fixed.forward([[1], [2]])
    require_close(found[:, -1], np.stack([tiny([*ids[:4], 1])[-1], tiny([*ids[5:7], 2])[-1]]))
    with pytest.raises(InputError, match="the cache holds 2 rows and 1 were given"):
        fixed.decode(1)


@pytest.mark.parametrize(("graph", "fields"), [("standard", {}), ("static", {"chunk": 7}), ("static", {"chunk": 1})])
def test_the_context_can_be_filled_and_no_further(make_bundle, tiny_odd, graph, fields):
    """The last run of a chunk is filled up beyond the context; a chunk of one token is one graph."""
    engine = Engine(make_bundle(tiny_odd, graph, **fields), threads=1)
    engine.prefill(IDS[:-1])
    require_close(engine.decode(IDS[-1]), tiny_odd(IDS)[-1])
    with pytest.raises(InputError, match="24 tokens are in the cache and 1 more were given; the context is 24"):
        engine.decode(1)


@pytest.mark.parametrize("fields", [{"padding": False}, {"rows": (RowsGeometry(3, 4),)}])
def test_where_a_hole_is_no_padding_the_cache_concatenates(fields, fixed):
    fixed.graph.manifest = replace(fixed.graph.manifest, **fields)
    assert isinstance(fixed.graph.new_cache(), KVCache)


def test_fixed_rows_say_what_they_cannot():
    rows = FixedRows([KVGeometry(2, 4, 6)], context_length=300)
    with pytest.raises(InputError, match="holds 0 tokens and cannot be trimmed to 1"):
        rows.trim(1)
    rows.grow(1, 5)
    assert (rows.capacity, rows.nbytes) == (GROWTH_STEP, 4 * GROWTH_STEP * 2 * (4 + 6))
    rows.grow(1, 299)
    assert rows.capacity == 300


# --- static graphs --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def bundle(tiny, make_bundle):
    return make_bundle(tiny, "static", chunk=CHUNK)


def test_all_logits_are_those_of_every_token(bundle, tiny):
    engine = Engine(bundle, threads=1, graph="all_logits")
    engine.forward([IDS[:5]])
    require_close(engine.forward([IDS[5:15]])[0], tiny(IDS[:15])[5:])
    assert Engine(bundle, threads=1).forward([IDS[:9]]).shape == (1, 1, 37)


def test_it_takes_one_row_without_padding(bundle):
    engine = Engine(bundle, threads=1)
    with pytest.raises(InputError, match="reads one row at a time, not 2: give each row separately"):
        engine.forward([IDS[:3], IDS[3:6]])
    with pytest.raises(InputError, match="does not support padding: give each row separately"):
        engine.forward([IDS[:3]], [[0, 1, 1]])
    assert engine.length == 0


@pytest.mark.parametrize(
    ("chunk", "windows", "words"),
    [
        (5, (0,), r"'(input_ids|mask)' is \(1, .*4.*\) in .*pastkey_prefill.*5.* in the manifest"),
        (CHUNK, (3,), "has the tensor 'mask', which the manifest does not name"),
    ],
)
def test_another_shape_than_the_manifests_names_the_tensor(bundle, chunk, windows, words):
    static = StaticShape(chunk, -1e4, windows)
    with pytest.raises(IntegrityError, match=words):
        Engine(replace(bundle, manifest=replace(bundle.manifest, static=static)))


def test_visible_columns_are_real_and_no_later_ones():
    found = visible_columns(2, 2, 4)
    np.testing.assert_array_equal(found, [[1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 1, 1]])
    np.testing.assert_array_equal(visible_columns(2, 2, 4, 2), [[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]])
    assert not visible_columns(0, 1, 3)[0, :3].any()

"""A static bundle: graphs of one token and of a chunk over arrays of past with holes, by the engine as any other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pastkey.contract.bundle import StaticShape
from pastkey.errors import InputError, IntegrityError
from pastkey.runtime.engine.caches.static_graphs import visible_columns
from pastkey.runtime.engine.engine import Engine

from ...conftest import ids_of, require_close

IDS = ids_of(24)
CHUNK = 4


@pytest.fixture(scope="module")
def bundle(tiny, make_bundle):
    return make_bundle(tiny, "static", chunk=CHUNK)


def test_all_logits_are_those_of_every_token(bundle, tiny):
    engine = Engine(bundle, threads=1, graph="all_logits")
    engine.forward([IDS[:5]])
    require_close(engine.forward([IDS[5:15]])[0], tiny(IDS[:15])[5:])
    assert Engine(bundle, threads=1).forward([IDS[:9]]).shape == (1, 1, 37)


@pytest.mark.parametrize("chunk", [7, 1])
def test_the_context_can_be_filled_and_no_further(make_bundle, tiny_odd, chunk):
    """The last run of a chunk is filled up beyond the context; a chunk of one token is one graph."""
    engine = Engine(make_bundle(tiny_odd, "static", chunk=chunk), threads=1)
    engine.prefill(IDS[:-1])
    require_close(engine.decode(IDS[-1]), tiny_odd(IDS)[-1])
    with pytest.raises(InputError, match="24 tokens are in the cache and 1 more were given; the context is 24"):
        engine.decode(1)


def test_it_takes_one_row_without_padding(bundle):
    engine = Engine(bundle, threads=1)
    with pytest.raises(InputError, match="one row at a time and 2 were given: give each row alone"):
        engine.forward([IDS[:3], IDS[3:6]])
    with pytest.raises(InputError, match="takes no padding: give each row alone"):
        engine.forward([IDS[:3]], [[0, 1, 1]])
    assert engine.length == 0


@pytest.mark.parametrize(
    ("chunk", "windows", "words"),
    [
        (5, (0,), r"'(input_ids|mask)' is \(1, .*4.*\) in .*pastkey_prefill.*5.* in the manifest"),
        (CHUNK, (3,), "has the tensor 'mask', which the manifest does not speak of"),
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

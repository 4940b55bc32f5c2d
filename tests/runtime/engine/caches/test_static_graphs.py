"""A static bundle: graphs of one token and of a chunk over arrays of past with holes, by the engine as any other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pastkey.contract.bundle import StaticShape
from pastkey.errors import InputError, IntegrityError
from pastkey.runtime.engine.caches.static_graphs import visible_columns
from pastkey.runtime.engine.engine import Engine

IDS = np.random.default_rng(0).integers(0, 37, 60)
CHUNK = 4


@pytest.fixture(scope="module")
def bundle(tiny, letters, make_bundle):
    return make_bundle(tiny, "static", chunk=CHUNK, tokenizer=letters)


@pytest.fixture
def engine(bundle):
    return Engine(bundle, threads=1)


def test_all_logits_are_those_of_every_token(bundle, tiny):
    engine = Engine(bundle, threads=1, graph="all_logits")
    engine.forward(IDS[None, :5])
    np.testing.assert_allclose(engine.forward(IDS[None, 5:15])[0], tiny(IDS[:15])[5:], atol=1e-4)
    assert Engine(bundle, threads=1).forward(IDS[None, :9]).shape == (1, 1, 37)


def test_the_context_can_be_filled_and_no_further(make_bundle, tiny_odd):
    engine = Engine(make_bundle(tiny_odd, "static", chunk=7), threads=1)
    ids = IDS[: tiny_odd.context_length]
    engine.prefill(ids[:-1])  # its last run is filled up beyond the context
    np.testing.assert_allclose(engine.decode(int(ids[-1])), tiny_odd(ids)[-1], atol=1e-4)
    with pytest.raises(InputError, match="24 tokens are in the cache and 1 more were given; the context is 24"):
        engine.decode(1)


def test_a_chunk_of_one_token_is_one_graph(make_bundle, tiny_odd):
    engine = Engine(make_bundle(tiny_odd, "static", chunk=1), threads=1)
    np.testing.assert_allclose(engine.prefill(IDS[:9]), tiny_odd(IDS[:9])[-1], atol=1e-4)


def test_it_takes_one_row_without_padding(engine):
    with pytest.raises(InputError, match="one row at a time and 2 were given: give each row alone"):
        engine.forward(IDS[:6].reshape(2, 3))
    with pytest.raises(InputError, match="takes no padding: give each row alone"):
        engine.forward(IDS[None, :3], [[0, 1, 1]])
    assert engine.length == 0


def test_rows_and_nbytes(engine, tiny):
    assert engine.cache.nbytes == 0
    engine.prefill(IDS[:5])
    x = tiny.weights["embedding"][IDS[:5]] + tiny.weights["position"][:5]
    keys = engine.cache.rows(5)[0]
    np.testing.assert_allclose(keys[0], (x @ tiny.weights["wk0"]).reshape(5, 2, 8).transpose(1, 0, 2), atol=1e-5)
    assert engine.cache.nbytes == 4 * 2 * (8 + 8 + 16 + 16) * tiny.context_length


@pytest.mark.parametrize(
    ("static", "sentence"),
    [
        (StaticShape(5, -1e4, (0,)), r"'(input_ids|mask)' is \(1, .*4.*\) in .*pastkey_prefill.*5.* in the manifest"),
        (StaticShape(CHUNK, -1e4, (3,)), "has the tensor 'mask', which the manifest does not speak of"),
    ],
)
def test_another_shape_than_the_manifests_names_the_tensor(bundle, static, sentence):
    with pytest.raises(IntegrityError, match=sentence):
        Engine(replace(bundle, manifest=replace(bundle.manifest, static=static)))


def test_visible_columns_are_real_and_no_later_ones():
    found = visible_columns(2, 2, 4)
    np.testing.assert_array_equal(found, [[1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 1, 1]])
    np.testing.assert_array_equal(visible_columns(2, 2, 4, 2), [[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]])
    assert not visible_columns(0, 1, 3)[0, :3].any()

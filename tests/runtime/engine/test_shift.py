"""After a shift the cache computes what keys do that were kept unturned and are turned at their new places."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from pastkey.contract.bundle import KeyRotation
from pastkey.errors import InputError
from pastkey.providers import PROVIDERS
from pastkey.runtime import Engine
from pastkey.runtime.engine import engine as engines
from pastkey.runtime.engine.shift import turned

from ..conftest import ids_of, require_close
from ..rotary import RotaryTiny

CONTEXT, SIZE = 64, 16
FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # graph, decoder, bundle
    "fused, rotated inside": ("fused", {"pairs": 8, "inside": True}, {}),
    "fused, interleaved inside": ("fused", {"pairs": 8, "inside": True, "interleaved": True}, {}),
    "fused, a part interleaved": ("fused", {"pairs": 3, "interleaved": True}, {}),
    "standard, a part": ("standard", {"pairs": 3}, {}),
    "standard, interleaved": ("standard", {"pairs": 8, "interleaved": True}, {}),
    "static": ("static", {"pairs": 4}, {"chunk": 8}),
    "fixed": ("standard", {"pairs": 4}, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_decode_after_shift_equals_keys_rotated_anew(form, make_bundle, monkeypatch):
    """The context is filled twice, by runs of one token and of several, with shifts of different sizes."""
    if form == "fixed":
        monkeypatch.setitem(PROVIDERS, "cpu", dataclasses.replace(PROVIDERS["cpu"], fixed_shapes=True))
    graph, decoder, fields = FORMS[form]
    tiny = RotaryTiny.of(SIZE, CONTEXT, **decoder)
    engine = Engine(tiny.written(make_bundle, graph, **fields), threads=1)
    reference, sinks = tiny.reference(), 3
    ids = ids_of(CONTEXT)
    require_close(engine.prefill(ids), reference.feed(ids)[-1])
    for gone, more in ((20, 9), (1, 1), (30, 30)):
        engine.shift(sinks, gone)
        reference.drop(sinks, gone)
        for token in ids_of(3, gone):
            require_close(engine.decode(token), reference.feed([token])[-1])
        several = ids_of(more, gone + 1)
        require_close(engine.prefill(several), reference.feed(several)[-1])
    assert engine.length == CONTEXT - 51 + 9 + 40


def test_keys_in_float16_stay_so():
    keys = np.random.default_rng(0).normal(size=(1, 2, 5, 8)).astype(np.float16)
    rotation = KeyRotation((0,), 2, False, (0.5, 0.1))
    there = turned(keys, rotation, 30)
    assert there.dtype == np.float16
    assert np.array_equal(there[..., :2], keys[..., :2])
    assert np.array_equal(there[..., 6:], keys[..., 6:])
    assert not np.allclose(there[..., 2:6], keys[..., 2:6], atol=1e-2)
    assert np.allclose(turned(there, rotation, -30), keys, atol=1e-2)


# --- what the cache says of itself --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def bundle(make_bundle):
    return RotaryTiny.of(SIZE, CONTEXT, pairs=8, inside=True).written(make_bundle)


def test_what_is_left_is_no_prefix_of_a_text(bundle):
    engine, ids = Engine(bundle, threads=1), ids_of(40)
    engine.prefill(ids)
    engine.shift(4, 10)
    kept = [*ids[:4], *ids[14:]]
    assert (engine.length, engine.cached_ids, engine.exact_length) == (30, [], 4)
    assert engine.shared_with(kept) == 0
    assert engine.copy().shared_with(kept) == 0
    engine.decode(1)
    assert engine.cached_ids == []
    assert engine.keep_prefix(kept) == 0
    engine.prefill(kept)
    assert engine.cached_ids == kept


def test_an_error_within_a_shift_empties_the_cache(bundle, monkeypatch):
    engine = Engine(bundle, threads=1)
    engine.prefill(ids_of(40))

    def moved(index: int, rows: Any) -> Any:
        if index:
            raise KeyboardInterrupt
        return rows

    monkeypatch.setattr(engines, "moved_by", lambda *_: moved)
    with pytest.raises(KeyboardInterrupt):
        engine.shift(4, 10)
    assert (engine.length, engine.cached_ids) == (0, [])
    engine.prefill([1, 2, 3])
    assert engine.cached_ids == [1, 2, 3]


@pytest.mark.parametrize(("keep", "count"), [(-1, 2), (0, 11), (8, 3), (4, -1)])
def test_tokens_that_are_not_there(bundle, keep, count):
    engine = Engine(bundle, threads=1)
    engine.prefill(ids_of(10))
    with pytest.raises(InputError, match="a shift needs one row without padding, and tokens that are there"):
        engine.shift(keep, count)
    engine.reset()
    engine.forward([ids_of(10), ids_of(10, 1)])
    with pytest.raises(InputError, match="a cache of 2 rows of 10 tokens"):
        engine.shift(0, 2)

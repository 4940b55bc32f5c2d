"""Attention calls with a window keep the rows that a token may still see, beside calls that keep all."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from pastkey.errors import InputError, IntegrityError
from pastkey.runtime import Engine
from pastkey.runtime.engine.caches.kv import TRIMMABLE, WINDOW_MARKS
from pastkey.runtime.engine.caches.slab import Slab

from ...conftest import ids_of, require_close
from ...rotary import RotaryTiny

SIZE, CONTEXT, WINDOW = 16, 1000, 8
INSIDE = {"pairs": 8, "inside": True}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "one of two calls": ("fused", {**INSIDE, "local": (1,)}),
    "the first call": ("fused", {"pairs": 3, "interleaved": True, "local": (0,)}),
    "all calls": ("fused", INSIDE),
    "all calls, standard": ("standard", {"pairs": 8}),
}


@pytest.fixture(scope="module")
def tiny():
    return RotaryTiny.of(SIZE, CONTEXT, window=WINDOW, local=(1,), **INSIDE)


@pytest.fixture(scope="module")
def bundle(tiny, make_bundle):
    return tiny.written(make_bundle)


@pytest.fixture
def engine(bundle):
    made = Engine(bundle, threads=1)
    made.marks = True
    return made


def held(engine: Engine) -> int:
    """Rows of the windowed calls."""
    return engine.cache.length - engine.cache.evicted  # type: ignore[union-attr]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [1, WINDOW, 150])
def test_what_no_window_sees_leaves_the_cache(form, window, make_bundle):
    graph, decoder = FORMS[form]
    tiny = RotaryTiny.of(SIZE, CONTEXT, window=window, **decoder)
    engine, reference, ids = Engine(tiny.written(make_bundle, graph), threads=1), tiny.reference(), ids_of(600)
    most = 0
    for part in (ids[:7], ids[7:200], ids[200:230]):
        require_close(engine.prefill(part, chunk_size=50), reference.feed(part)[-1])
    for token in ids[230:]:
        require_close(engine.decode(token), reference.feed([token])[-1])
        most = max(most, held(engine))
    assert (engine.length, engine.cached_ids) == (600, ids)
    assert most <= 1.25 * (window + TRIMMABLE) + 128
    assert engine.nbytes <= engine.graph.cache_bytes(600)


def test_a_long_prefill_allocates_the_window_alone(engine, tiny):
    ids = ids_of(900)
    require_close(engine.prefill(ids), tiny(ids)[-1])
    rows = [array.shape[2] for array in engine.cache.arrays]
    assert max(rows[2:]) <= engine.graph.window_rows < min(rows[:2]) <= 1000

"""The graph with an int8 cache is written where a context is long, and kept where it costs little."""

from __future__ import annotations

import numpy as np
import pytest

from pastkey.contract.bundle import open_bundle
from pastkey.export import export
from pastkey.export.measure.metrics import kl_divergence
from pastkey.export.quantize import int8_kv
from pastkey.runtime import Engine
from pastkey.runtime.engine.caches.int8_kv import INT8_KV_FROM

from ..decoders import llama

IDS = np.random.default_rng(0).integers(0, 61, 80)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long") / "bundle"
    export(llama(), folder, context_length=INT8_KV_FROM + 1)
    return open_bundle(folder)


def decoded(session: Engine, first: int = 20) -> np.ndarray:
    session.reset()
    session.prefill(IDS[:first])
    return np.stack([session.decode(int(token)) for token in IDS[first:]])


@pytest.mark.slow
def test_an_int8_cache_is_close_to_a_float32_one(bundle):
    assert bundle.int8_kv_graph is not None
    assert 0 < bundle.manifest.quality["int8_cache_kl"] < 1e-3
    exact, rounded = (decoded(Engine(bundle, int8_kv_from=first)) for first in (None, 30))
    np.testing.assert_array_equal(rounded[:10], exact[:10])  # tokens 20 to 29
    assert np.abs(rounded[10:] - exact[10:]).max() > 0
    assert kl_divergence(exact, rounded) < 1e-3


def test_a_context_that_never_gets_long_has_no_such_graph(exported):
    made = exported("llama", "int8").bundle
    assert made.int8_kv_graph is None
    assert "int8_cache_kl" not in made.manifest.quality


def test_an_int8_cache_that_costs_too_much_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(int8_kv, "_MARGIN", 0.05)  # cuts off nearly everything
    report = export(llama(), tmp_path / "cut", context_length=INT8_KV_FROM + 1)
    assert open_bundle(tmp_path / "cut").int8_kv_graph is None
    assert "int8_cache_kl" not in report.manifest.quality

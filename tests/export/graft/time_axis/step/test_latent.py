"""A smaller row that keys and values are linear functions of is cached in their place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pastkey.contract.bundle import KVGeometry, open_bundle
from pastkey.export import export
from pastkey.export.graft.probe.observe import observe, run_cached, run_uncached
from pastkey.export.graft.time_axis.step.decoder import TimeAxisDecoder, find
from pastkey.runtime.engine.engine import Engine

from .....shared import divided
from ...own.latents import DECODERS
from ...own.parts import HEADS, WIDTH

KEPT = KVGeometry(HEADS, WIDTH // HEADS, WIDTH // HEADS)  # keys and values themselves
SHAPES = {
    "latent": KVGeometry(1, 4, 12),  # the rotated key, and the latent
    "latent_by_cat": KVGeometry(1, 4, 12),
    "latent_filled": KVGeometry(1, 4, 12),
    "latent_absorbed": KVGeometry(1, 4, 12),
    "latent_unturned": KVGeometry(1, 6, 6),  # two halves of the latent
    "two_latents": KVGeometry(1, 8, 8),
    "latent_turned_after": KVGeometry(WIDTH // 4, 4, 4),
    "wide_latent": KEPT,
}


def decoder_of(name: str, *, latents: bool = True) -> TimeAxisDecoder:
    own = DECODERS[name]
    module = own.make()
    with torch.no_grad():
        found = find(module, own.call, own.context, own.vocab, latents=latents)
    return TimeAxisDecoder(module, own.call, found, own.context).eval()


@pytest.mark.parametrize("name", divided(SHAPES, quick=["latent_by_cat"], ci=SHAPES))
def test_the_smallest_row_is_cached_and_gives_what_the_author_computes(name):
    own, decoder = DECODERS[name], decoder_of(name)
    assert {layer.geometry for layer in observe(decoder, own.context).layers} == {SHAPES[name]}
    ids = torch.randint(0, own.vocab, (2, 23), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = own.call(decoder.model, ids)
    cached = run_cached(decoder, run_uncached(decoder, ids[:, :11]), ids[:, 11:])
    for found, wanted in ((run_uncached(decoder, ids).logits, expected), (cached, expected[:, 11:])):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.slow
def test_the_fused_graph_gets_keys_and_values():
    decoder = decoder_of("latent_by_cat", latents=False)
    assert observe(decoder, DECODERS["latent_by_cat"].context).layers[0].geometry == KVGeometry(HEADS, 12, 12)


@pytest.mark.slow
def test_the_runtimes_cache_holds_the_row_alone(tmp_path):
    """The export itself compares steps, chunks and batches of different lengths with the author's call."""
    own = DECODERS["latent_filled"]
    report = export(own.make(), tmp_path / "bundle", precision="int8", context_length=own.context)
    assert report.manifest.parity["int8"]["ok"]
    assert report.manifest.shift.rotations  # the key is the rotated part
    engine = Engine(open_bundle(tmp_path / "bundle"))
    ids = torch.randint(0, own.vocab, (20,), generator=torch.Generator().manual_seed(3)).tolist()
    engine.prefill(ids)
    assert engine.nbytes == len(ids) * (12 + 4) * own.layers * np.float32().nbytes
    fork = engine.copy(12)
    engine.trim(12)
    for other in (engine, fork):
        fresh = Engine.over(engine.graph)
        fresh.prefill(ids[:12])
        np.testing.assert_array_equal(other.append(ids[3:9]), fresh.append(ids[3:9]))

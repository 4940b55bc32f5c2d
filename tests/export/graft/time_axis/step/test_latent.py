"""A smaller row that keys and values are linear functions of is cached in their place."""

from __future__ import annotations

import pytest
import torch

from pastkey.contract.bundle import KVGeometry
from pastkey.export.graft.probe.observe import observe, run_cached, run_uncached
from pastkey.export.graft.time_axis.step.decoder import TimeAxisDecoder, find

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


@pytest.mark.parametrize("name", SHAPES)
def test_the_smallest_row_is_cached_and_gives_what_the_author_computes(name: str) -> None:
    own, decoder = DECODERS[name], decoder_of(name)
    assert {layer.geometry for layer in observe(decoder, own.context).layers} == {SHAPES[name]}
    ids = torch.randint(0, own.vocab, (2, 23), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = own.call(decoder.model, ids)
    allowed = {"rtol": 0, "atol": 1e-5 * float(expected.abs().max())}
    torch.testing.assert_close(run_uncached(decoder, ids).logits, expected, **allowed)
    cached = run_cached(decoder, run_uncached(decoder, ids[:, :11]), ids[:, 11:])
    torch.testing.assert_close(cached, expected[:, 11:], **allowed)


def test_the_fused_graph_gets_keys_and_values() -> None:
    decoder = decoder_of("latent_by_cat", latents=False)
    assert observe(decoder, DECODERS["latent_by_cat"].context).layers[0].geometry == KVGeometry(HEADS, 12, 12)

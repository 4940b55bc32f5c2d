"""A smaller row that keys and values are linear functions of is cached in their place."""

import pytest
import torch

from pastkey.contract.bundle import KVGeometry
from pastkey.export.graft.probe.contract import in_contract
from pastkey.export.graft.probe.observe import observe
from pastkey.export.graft.probe.positions import find_shift
from pastkey.export.graft.time_axis.step.decoder import TimeAxisDecoder, find

from ...own.latents import DECODERS, ROPE
from ...own.parts import HEADS

OWN = DECODERS["latent_filled"]


@pytest.mark.slow
def test_the_fused_graph_gets_keys_and_values():
    own = DECODERS["latent_by_cat"]
    found = in_contract(own.make(), own.context, None, lambda _: None, latents=False)
    assert found.observation.geometry[0] == KVGeometry(HEADS, 12, 12)


def test_the_rotated_key_alone_is_turned_by_a_shift():
    module = OWN.make()
    with torch.no_grad():
        found = find(module, OWN.call, OWN.context, OWN.vocab)
    decoder = TimeAxisDecoder(module, OWN.call, found, OWN.context).eval()
    observation = observe(decoder, OWN.context)
    assert observation.geometry[0] == OWN.geometry
    (rotation,) = find_shift(decoder, observation, OWN.context).rotations
    assert (rotation.first, 2 * len(rotation.angles)) == (0, ROPE)

"""Decoders as people write them, and modules that are none: what the tests of unedited modules run through."""

from __future__ import annotations

from . import biases, blocks, by_hand, experts, heads, latents, outputs, positions, torch_layers
from .parts import Own
from .refused import REFUSED as REFUSED

ROOMS = (by_hand, heads, positions, biases, outputs, torch_layers, blocks, experts, latents)
DECODERS: dict[str, Own] = {name: own for room in ROOMS for name, own in room.DECODERS.items()}

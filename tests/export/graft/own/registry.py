"""Decoders as people write them, and modules that are none: what the tests of unedited modules run through."""

from __future__ import annotations

from . import biases, blocks, by_hand, experts, heads, latents, look_ahead, outputs, positions, refused, torch_layers
from .parts import Own, Refused

DECODERS: dict[str, Own] = (
    by_hand.DECODERS
    | heads.DECODERS
    | positions.DECODERS
    | biases.DECODERS
    | outputs.DECODERS
    | torch_layers.DECODERS
    | blocks.DECODERS
    | experts.DECODERS
    | latents.DECODERS
)
REFUSED: dict[str, Refused] = look_ahead.REFUSED | refused.REFUSED

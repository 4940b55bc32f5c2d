"""Decoders as people write them, and modules that are none: the cases for the tests of unedited modules."""

from . import biases, blocks, by_hand, latents, loops, outputs, positions
from .refused import REFUSED as REFUSED

ROOMS = (by_hand, positions, biases, outputs, blocks, latents, loops)
DECODERS = {name: own for room in ROOMS for name, own in room.DECODERS.items()}

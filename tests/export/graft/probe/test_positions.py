"""How positions enter is seen by running the module, whatever its code calls them."""

from typing import Any

import numpy as np
import pytest
import torch

from pastkey.contract.bundle import CacheShift
from pastkey.export.graft.probe.observe import observe
from pastkey.export.graft.probe.positions import find_shift

from ...decoders import BothPositions, GptJ, Plain, TableRope

CONTEXT = 40


def shift_of(module, context_length=CONTEXT):
    return find_shift(module.eval(), observe(module.eval(), context_length), context_length)


class Unplaced(Plain):
    """No positions at all."""

    def embed(self, input_ids, position_ids):
        return self.token(input_ids)


class Turning(Unplaced):
    """`first` and `pairs` say which channels turn, by `theta`; `factor` scales cos and sin, as YaRN does."""

    first, pairs, theta, factor = 0, 4, 100.0, 1.0
    interleaved = False

    def angles(self, position_ids):
        return position_ids[:, None, :, None] * self.theta ** (-torch.arange(self.pairs) / self.pairs)

    def turn(self, heads, position_ids):
        angles = self.angles(position_ids)
        cos, sin = self.factor * angles.cos(), self.factor * angles.sin()
        middle, end = self.first + self.pairs, self.first + 2 * self.pairs
        places = slice(self.first, middle), slice(middle, end)
        if self.interleaved:
            places = slice(self.first, end, 2), slice(self.first + 1, end, 2)
        one, other = (heads[..., place] for place in places)
        found = heads.clone()
        found[..., places[0]], found[..., places[1]] = one * cos - other * sin, other * cos + one * sin
        return found


class FasterLater(Turning):
    """Dynamic rotary positions, which change with the length."""

    def angles(self, position_ids):
        return super().angles(position_ids) * (1 + position_ids.amax() / 100)


class Growing(Turning):
    """Keys that grow with their position as queries shrink, as xPos has them."""

    grows = True

    def turn(self, heads, position_ids):
        self.grows = not self.grows  # queries, then keys
        return super().turn(heads, position_ids) * (1.01 if self.grows else 1 / 1.01) ** position_ids[:, None, :, None]


class ByLayer(Turning):
    """The second layer turns by other angles."""

    def apply_block(self, block, hidden, position_ids):
        self.theta = 10.0 if block is self.blocks[1] else 100.0
        return super().apply_block(block, hidden, position_ids)


FOUND: dict[str, Any] = {  # the decoder and its change; first channel, pairs, interleaved
    "halves": (Turning, {}, (0, 4, False)),
    "scaled": (Turning, {"factor": 1.3}, (0, 4, False)),
    "the last channels": (Turning, {"first": 4, "pairs": 2}, (4, 2, False)),
    "neighbours of tables": (TableRope, {}, (0, 4, True)),
    "neighbours of a part": (GptJ, {}, (0, 4, True)),
    "the first neighbours": (Turning, {"pairs": 3, "interleaved": True}, (0, 4, True)),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_rotation_is_found(name):
    kind, changes, expected = FOUND[name]
    module = type("Decoder", (kind,), changes)(context=CONTEXT, layers=2)
    found = shift_of(module)
    (rotation,) = found.rotations
    assert rotation.layers == (0, 1)
    assert (rotation.first, len(rotation.angles), rotation.interleaved) == expected
    if isinstance(module, Turning):
        angles = module.theta ** (-np.arange(module.pairs) / module.pairs)
        assert np.abs(np.array(rotation.angles[: module.pairs]) - angles).max() < 1e-6
        assert np.abs(rotation.angles[module.pairs :]).sum() < 1e-6


def test_angles_of_a_long_context_are_as_precise_as_its_positions_need():
    found = shift_of(Turning(context=8192), 8192).rotations[0].angles
    expected = Turning.theta ** (-np.arange(4) / 4)
    # float32's own: half a unit of the last place of 8192.
    assert np.abs(np.array(found) - expected).max() * 8192 < 2e-3


def test_without_positions_only_rows_go_and_layers_may_turn_by_other_angles():
    assert shift_of(Unplaced(context=CONTEXT)) == CacheShift()
    assert [rotation.layers for rotation in shift_of(ByLayer(context=CONTEXT, layers=3)).rotations] == [(0, 2), (1,)]


@pytest.mark.parametrize(
    ("kind", "context", "reason"),
    [
        (Plain, CONTEXT, "neither a rotation of keys nor distances"),
        (BothPositions, CONTEXT, "neither a rotation of keys nor distances"),
        (FasterLater, CONTEXT, "neither a rotation of keys nor distances"),
        (Growing, CONTEXT, "not by one angle per token"),
        (Turning, 1, "its context is one token"),
    ],
)
def test_what_no_shift_can_move_is_refused(kind, context, reason):
    assert reason in shift_of(kind(context=context), context).refused

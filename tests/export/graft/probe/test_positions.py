"""How positions enter is seen by running the module, whatever its code calls them; a shift of its bundle is exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pastkey.contract.bundle import CacheShift, KeyRotation, open_bundle
from pastkey.export import export
from pastkey.export.graft.attention import AttentionCall, intercept
from pastkey.export.graft.probe import positions
from pastkey.export.graft.probe.observe import Uncached, observe, run_uncached
from pastkey.export.graft.probe.positions import as_pairs, find_shift
from pastkey.runtime import Engine

from ....shared import divided
from ...decoders import BothPositions, GptJ, Plain, TableRope, llama

CONTEXT = 40
LEARNED = "as learned ones do"


def shift_of(module: nn.Module, context_length: int = CONTEXT) -> CacheShift:
    return find_shift(module.eval(), observe(module.eval(), context_length), context_length)


class Unplaced(Plain):
    """No positions at all."""

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.token(input_ids)


class Turning(Unplaced):
    """`first` and `pairs` say which channels turn, by `theta`; `factor` scales cos and sin, as YaRN does."""

    first, pairs, theta, factor = 0, 4, 100.0, 1.0
    interleaved = False

    def angles(self, position_ids: Tensor) -> Tensor:
        return position_ids[:, None, :, None] * self.theta ** (-torch.arange(self.pairs) / self.pairs)

    def turn(self, heads: Tensor, position_ids: Tensor) -> Tensor:
        angles = self.angles(position_ids)
        cos, sin = self.factor * angles.cos(), self.factor * angles.sin()
        if self.interleaved:
            places = (
                slice(self.first, self.first + 2 * self.pairs, 2),
                slice(self.first + 1, self.first + 2 * self.pairs, 2),
            )
        else:
            middle = self.first + self.pairs
            places = slice(self.first, middle), slice(middle, middle + self.pairs)
        one, other = (heads[..., place] for place in places)
        found = heads.clone()
        found[..., places[0]], found[..., places[1]] = one * cos - other * sin, other * cos + one * sin
        return found


class Scaled(Turning):
    factor = 1.3


class LastChannels(Turning):
    first, pairs = 4, 2


class FirstNeighbours(Turning):
    pairs, interleaved = 3, True


class FasterLater(Turning):
    """Dynamic rotary positions, which change with the length."""

    def angles(self, position_ids: Tensor) -> Tensor:
        return super().angles(position_ids) * (1 + position_ids.amax() / 100)


class Growing(Turning):
    """Keys that grow with their position as queries shrink, as xPos has them."""

    grows = True

    def turn(self, heads: Tensor, position_ids: Tensor) -> Tensor:
        self.grows = not self.grows  # queries, then keys
        return super().turn(heads, position_ids) * (1.01 if self.grows else 1 / 1.01) ** position_ids[:, None, :, None]


FOUND: dict[type[Plain], tuple[int, int, bool]] = {  # first channel, pairs, interleaved
    Turning: (0, 4, False),
    Scaled: (0, 4, False),
    LastChannels: (4, 2, False),
    TableRope: (0, 4, True),
    GptJ: (0, 4, True),
    FirstNeighbours: (0, 4, True),
}


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
def test_a_rotation_is_found(kind):
    module = kind(context=CONTEXT, layers=2)
    found = shift_of(module)
    assert found.refused == ""
    (rotation,) = found.rotations
    assert rotation.layers == (0, 1)
    assert (rotation.first, len(rotation.angles), rotation.interleaved) == FOUND[kind]
    if isinstance(module, Turning):
        expected = module.theta ** (-np.arange(module.pairs) / module.pairs)
        assert np.abs(np.array(rotation.angles[: module.pairs]) - expected).max() < 1e-6
        assert np.abs(rotation.angles[module.pairs :]).sum() < 1e-6


def test_angles_of_a_long_context_are_as_precise_as_its_positions_need():
    found = shift_of(Turning(context=8192), 8192).rotations[0].angles
    expected = Turning.theta ** (-np.arange(4) / 4)
    # float32's own: half a unit of the last place of 8192.
    assert np.abs(np.array(found) - expected).max() * 8192 < 2e-3


def test_four_runs_show_the_angles_of_a_long_context(monkeypatch):
    first: list[int] = []

    def run(module: nn.Module, ids: Tensor, position_ids: Tensor) -> Uncached:
        first.append(int(position_ids[0, 0]))
        return run_uncached(module, ids, position_ids)

    monkeypatch.setattr(positions, "run_uncached", run)
    assert len(shift_of(Turning(context=8192), 8192).rotations) == 1
    assert first == [0, 1, 90, 8176]


def test_without_positions_only_rows_go():
    assert shift_of(Unplaced(context=CONTEXT)) == CacheShift()


def test_layers_that_turn_by_other_angles():
    class Both(Turning):
        def apply_block(self, block: nn.ModuleDict, hidden: Tensor, position_ids: Tensor) -> Tensor:
            self.theta = {0: 100.0, 1: 10.0, 2: 100.0}[next(i for i, b in enumerate(self.blocks) if b is block)]
            return super().apply_block(block, hidden, position_ids)

    assert [rotation.layers for rotation in shift_of(Both(context=CONTEXT, layers=3)).rotations] == [(0, 2), (1,)]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Plain, LEARNED),
        (BothPositions, LEARNED),
        (Growing, "otherwise than by one angle per token"),
        (FasterLater, LEARNED),
    ],
)
def test_what_no_shift_can_move_is_refused(kind, reason):
    assert reason in shift_of(kind(context=CONTEXT)).refused


def test_a_context_without_room():
    assert shift_of(Turning(context=1), 1).refused == "its context is one token"


# --- the bundle ---------------------------------------------------------------------------------------------------
def turned_heads(heads: Tensor, places: Tensor, rotation: KeyRotation) -> Tensor:
    """(B, heads, T, D) at their places (T,), by complex numbers in float64."""
    end = rotation.first + 2 * len(rotation.angles)
    pairs = torch.from_numpy(as_pairs(heads.double().numpy()[..., rotation.first : end], rotation.interleaved))
    pairs = pairs * torch.exp(1j * places[:, None] * torch.tensor(rotation.angles, dtype=torch.float64))
    both = [pairs.real, pairs.imag]
    inner = torch.stack(both, -1).flatten(-2) if rotation.interleaved else torch.cat(both, -1)
    return torch.cat([heads[..., : rotation.first].double(), inner, heads[..., end:].double()], -1).float()


class Streaming:
    """A module that is given position 0 alone, where nothing turns: keys are turned at their places in the cache."""

    def __init__(self, module: nn.Module, rotation: KeyRotation, layers: int) -> None:
        self._module, self._rotation = module, rotation
        self._rows: list[Any] = [None] * layers  # keys and values (B, K, T, D)

    def drop(self, keep: int, count: int) -> None:
        for i, rows in enumerate(self._rows):
            self._rows[i] = [torch.cat([part[:, :, :keep], part[:, :, keep + count :]], 2) for part in rows]

    def feed(self, ids: list[int]) -> np.ndarray:
        """The logits (V,) after the last of `ids`."""
        calls = iter(range(len(self._rows)))

        def attend(call: AttentionCall) -> Tensor:
            layer = next(calls)
            before, new = self._rows[layer], tuple[Tensor, ...]((call.key, call.value))
            if before is not None:
                new = tuple(torch.cat(pair, 2) for pair in zip(before, new, strict=True))
            self._rows[layer] = keys, values = new
            places = torch.arange(keys.shape[2])
            keys = turned_heads(keys, places, self._rotation).repeat_interleave(call.groups, 1)
            query = turned_heads(call.query, places[-len(ids) :], self._rotation)
            scores = call.scale * query @ keys.transpose(2, 3)
            scores = scores.masked_fill(places[-len(ids) :, None] < places, -math.inf)
            return scores.softmax(-1) @ values.repeat_interleave(call.groups, 1)

        with torch.no_grad(), intercept(attend):
            logits = self._module.eval()(torch.tensor([ids]), torch.zeros(1, len(ids), dtype=torch.long))
        return logits[0, -1].numpy()


EXPORTED: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: llama(max_position_embeddings=CONTEXT),
    "a part, interleaved": lambda: GptJ(context=CONTEXT, layers=2, size=16),
}


@pytest.mark.parametrize(
    ("name", "graph"),
    divided(
        product(EXPORTED, ("fused", "standard")), quick=[("llama", "fused")], ci=[("a part, interleaved", "standard")]
    ),
)
def test_a_shifted_bundle_computes_what_streaming_does(name, graph, tmp_path):
    module = EXPORTED[name]()
    report = export(module, out=tmp_path / "b", precision="fp32", graph=graph, context_length=CONTEXT)
    assert report.manifest.shift is not None
    (rotation,) = report.manifest.shift.rotations
    engine = Engine(open_bundle(report.path), threads=1)
    reference = Streaming(module, rotation, len(report.manifest.layers))
    rng = np.random.default_rng(0)
    for count, gone in ((CONTEXT, 18), (1, 0), (17, 18), (5, 3), (1, 0)):
        ids = rng.integers(0, report.manifest.vocab_size, count).tolist()
        expected = reference.feed(ids)
        assert np.abs(engine.prefill(ids) - expected).max() <= 1e-4 * np.abs(expected).max()
        if gone:
            engine.shift(4, gone)
            reference.drop(4, gone)

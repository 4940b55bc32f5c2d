"""Fused operators compute the same as torch's, and are only where they do."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from torch import nn

from pastkey.export.compare import relative_difference
from pastkey.export.graft.probe.contract import in_contract
from pastkey.export.graft.probe.observe import observe
from pastkey.export.graft.trace import trace
from pastkey.export.graph.clean import clean
from pastkey.export.graph.fuse import fuse

from ...shared import divided
from ..cases import CASES
from ..decoders import Plain, TableRope, llama
from ..graft.own import positions as own
from ..graft.own.parts import NoPositions, drawn
from ..plain_loop import run_chunks

CONTEXT = 40


def fused(module, folder, allowed=3e-6, by_tokens=True):
    """Rotations of attention calls, and operators, after passes that change no number: at once and by tokens."""
    observation = observe(module, CONTEXT)
    for name in ("before", "after"):
        model = trace(module, observation, "fused", CONTEXT)
        if name == "after":
            fuse(model, CONTEXT)
        clean(model, module, observation.geometry, observation.vocab_size)
        ir.save(model, folder / f"{name}.onnx")
    ids = np.random.default_rng(0).integers(0, observation.vocab_size, CONTEXT).tolist()
    expected = run_chunks(folder / "before.onnx", [ids])
    for chunks in ([ids], [ids[:20], *([token] for token in ids[20:])])[: 1 + by_tokens]:
        found = run_chunks(folder / "after.onnx", chunks)
        assert relative_difference(expected, found) <= (allowed if len(chunks) == 1 else 3e-6)
    return rotating(folder / "after.onnx"), Counter(node.op_type for node in model.graph)


def rotating(path):
    """For each attention call, whether it rotates queries and keys itself."""
    nodes = [node for node in ir.load(path).graph if node.op_type == "GroupQueryAttention"]
    return [node.attributes.get_int("do_rotary", 0) == 1 for node in nodes]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="llama", marks=pytest.mark.matrix),
        pytest.param({"qk_norm": True}, id="qwen3", marks=pytest.mark.slow),
        pytest.param({"qkv_bias": True}, id="qwen2", marks=pytest.mark.matrix),
    ],
)
def test_norms_skips_and_rotation_are_fused_exactly(changes, tmp_path):
    rotated, operators = fused(llama(**changes), tmp_path)
    assert rotated == [True, True]
    assert not {"Pow", "ReduceMean", "Reciprocal", "Sqrt", "Split"} & set(operators)
    assert not {"Cos", "Sin"} & set(operators)  # the tables are stored
    # Norms of single heads split q and k and join them, by two shapes that are computed.
    assert operators["Reshape"] == (10 if "qk_norm" in changes else 0)
    assert operators["SkipSimplifiedLayerNormalization"] == 4  # all but the first one, which follows the embedding
    assert operators["SimplifiedLayerNormalization"] == 1 + 4 * ("qk_norm" in changes)


@pytest.mark.parametrize(
    "attention",
    divided(
        [own.RotaryTables, own.RotaryKept, own.RotaryGrouped, own.RotaryByLength, own.RotaryComplex],
        quick=[own.RotaryByLength, own.RotaryComplex],
        ci=[own.RotaryGrouped],
    ),
)
def test_rotations_as_people_write_them_move_into_attention(attention, tmp_path):
    """Halves and neighbours, tables and angles, real and complex numbers."""
    module = drawn(lambda: NoPositions(lambda: attention(heads=2)))
    followed = in_contract(module, CONTEXT, None, lambda _: None).module
    assert fused(followed, tmp_path)[0] == [True, True]


@pytest.mark.slow
def test_a_head_size_that_attention_cannot_rotate_keeps_its_rotation(tmp_path):
    rotated, operators = fused(llama(head_dim=24, hidden_size=48), tmp_path)
    assert rotated == [False, False]
    assert operators["SkipSimplifiedLayerNormalization"] == 4


@pytest.mark.matrix
def test_tables_that_would_outgrow_the_weights_are_not_made(tmp_path, monkeypatch):
    monkeypatch.setattr("pastkey.export.graph.rotary._TABLE_BYTES", CONTEXT * 16 * 4 - 1)  # cos and sin, half a head
    monkeypatch.setattr("pastkey.export.graph.rotary._TABLE_SHARE", 0)
    assert fused(llama(), tmp_path)[0] == [False, False]


class TurnedByToken(TableRope):
    """Angles that depend on more than the position."""

    def embed(self, input_ids, position_ids):
        self.shift = input_ids % 3
        return super().embed(input_ids, position_ids)

    def turn(self, heads, position_ids):
        return super().turn(heads, (position_ids + self.shift) % CONTEXT)


class TurnedByLength(TableRope):
    """Angles that follow the longest position, as those of dynamic NTK do."""

    def turn(self, heads, position_ids):
        return super().turn(heads, position_ids - (position_ids.max() > CONTEXT // 2).long())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "allowed", "by_tokens"),
    [
        (TableRope, 0, True),
        (lambda: TurnedByToken(size=16), 0, True),
        (lambda: TurnedByLength(size=16), 0, False),
        (CASES["gpt2"].build, 3e-6, True),  # a product whose result is not reshaped any more runs as another kernel
    ],
)
def test_what_is_not_the_pattern_is_left_alone(build, allowed, by_tokens, tmp_path):
    assert not any(fused(build(), tmp_path, allowed, by_tokens)[0])


class OneRowOfPositions(Plain):
    """A sum that spreads one row over the batch, before an RMSNorm: Add does so, the fused operator does not."""

    def more(self):
        self.norm = nn.RMSNorm(self.width)

    def embed(self, input_ids, position_ids):
        return self.norm(self.token(input_ids) + self.position.weight[3])


def test_a_sum_that_spreads_is_not_fused(tmp_path):
    assert fused(OneRowOfPositions(), tmp_path)[1]["SimplifiedLayerNormalization"] == 1

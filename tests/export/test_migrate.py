"""Moving scales changes no product, and makes int8 better where channels differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from pastkey.export import export
from pastkey.export.calibrate import activations, own_text
from pastkey.export.evaluate import kl_divergence, relative_difference
from pastkey.export.migrate import find_groups, migrate
from pastkey.export.quantize import quantize

from .conftest import Export
from .decoders import llama
from .plain_loop import run_chunks


def migrated(graph: Path, ids: list[int], out: Path) -> tuple[ir.Model, dict[str, float]]:
    """The graph with its scales moved, written to `out`, and the exponents."""
    model = ir.load(graph)
    groups = find_groups(model)
    chosen = migrate(model, groups, activations(graph, [group.activation for group in groups], ids))
    ir.save(model, out, external_data=f"{out.name}_data")
    return model, chosen


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("llama", 8),  # per layer: q k v, o (two query heads to a value head), gate and up, down; the head is tied
        ("gpt2", 7),  # per layer: q k v, o, the MLP's first product (GELU ends it there); the head
        ("nano_gpt", 2),  # q, k, v are one product, so that the values have none of their own; the head is tied
        ("one_block_five_times", 0),  # its weights have five places
    ],
)
def test_moving_scales_changes_no_logits(name: str, groups: int, exported: Export, tmp_path: Path) -> None:
    made = exported(name)
    graph = made.bundle.common_graph
    ids = own_text(made.bundle)
    found = find_groups(ir.load(graph))
    assert len(found) == groups, [group.activation for group in found]
    if not groups:
        return
    expected = run_chunks(graph, [ids])
    _, chosen = migrated(graph, ids, tmp_path / "moved.onnx")
    assert set(chosen) == {group.activation for group in found}
    assert relative_difference(expected, run_chunks(tmp_path / "moved.onnx", [ids])) < 5e-6


def test_channels_of_other_sizes_cost_int8_less(tmp_path: Path) -> None:
    """Outliers as trained decoders have them: a norm's weight that is 40 times its neighbours'."""
    module = llama()
    with torch.no_grad():
        for layer in module.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[::32] *= 40
    report = export(module, tmp_path / "fp32", precision="fp32", context_length=40)
    graph = report.path / "onnx" / "model.onnx"
    ids = np.random.default_rng(0).integers(0, 61, 40).tolist()
    expected = run_chunks(graph, [ids])
    plain = ir.load(graph)
    quantize(plain)
    ir.save(plain, tmp_path / "plain.onnx", external_data="plain.onnx_data")
    moved, chosen = migrated(graph, ids, tmp_path / "moved.onnx")
    assert max(chosen.values()) > 0
    quantize(moved)
    ir.save(moved, tmp_path / "int8.onnx", external_data="int8.onnx_data")
    before, after = (
        kl_divergence(expected, run_chunks(tmp_path / name, [ids])) for name in ("plain.onnx", "int8.onnx")
    )
    assert after < before / 3

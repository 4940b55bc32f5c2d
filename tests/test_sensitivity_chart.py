"""benchmarks/sensitivity_chart.py: what each matrix costs, drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from benchmarks.sensitivity_chart import main as draw_sensitivity
from benchmarks.sensitivity_chart import place
from pastkey.export.quantize.ranking.sensitivity import Row, Sensitivity
from pastkey.export.quantize.report import write_report


def a_table(layers: int = 30) -> Sensitivity:
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
    rng = np.random.default_rng(0)
    rows = [
        Row(f"model.layers.{layer}.{kind}.weight", (8, 8), float(rng.lognormal(-9, 2)), 0.9, 0.01, matmul=True)
        for layer in range(layers)
        for kind in kinds
    ]
    rows.append(Row("model.embed_tokens.weight", (61, 8), 0.0, 1.0, 0.1, matmul=False))
    return Sensitivity(0.01, tuple(sorted(rows, key=lambda row: -row.kl_divergence)))


@pytest.mark.parametrize(
    "table",
    [
        a_table(),
        a_table(1),
        Sensitivity(0.1, (Row("head", (2, 2), 0.1, 1.0, 1.0, matmul=True),)),
        Sensitivity(0.0, (Row("layers.0.up.weight", (2, 2), 0.0, 1.0, 1.0, matmul=True),)),
    ],
    ids=["thirty_layers", "one_layer", "no_layer", "no_cost"],
)
def test_the_file_of_an_export_is_drawn(table: Sensitivity, tmp_path: Path) -> None:
    write_report(tmp_path / "table.json", table)
    assert draw_sensitivity([str(tmp_path / "table.json"), str(tmp_path / "chart.png")]) == 0
    image = imread(tmp_path / "chart.png")
    assert min(image.shape[:2]) > 400
    assert image.std() > 0.01


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (3, "q_proj")),
        ("model.layers.12.mlp.up_proj.weight.scaled_0", (12, "up_proj")),
        ("blocks.0.o.weight", (0, "o")),
        ("h.4.mlp.2.weight", (4, "mlp.2")),
        ("head.weight", None),
    ],
)
def test_a_name_says_layer_and_kind(weight: str, expected: tuple[int, str] | None) -> None:
    assert place(weight) == expected

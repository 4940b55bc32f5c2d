"""The cost of each matrix in int8 or int4: every layer's matrices as a heat map, the ten worst as bars.

    python -m benchmarks sensitivity-chart TABLE CHART

TABLE is the file of `pastkey export --sensitivity TABLE`, and CHART the name of a .png.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from benchmarks.measure import Answer, TextFile
from pastkey.files.folder import read_json

_BARS = 10
_LONGEST_NAME = 44  # characters of a bar's label
_DECADES = 6  # of the colour scale, below the largest
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_ENDINGS = re.compile(r"(\.scaled_\d+)?$")


class Row(NamedTuple):
    weight: str
    kl_divergence: float  # nats


def sensitivity_chart(table: TextFile, chart: Path) -> Answer:
    """The table is the file of `pastkey export --sensitivity`, and the chart a .png."""
    costs = read_json(table)
    draw(chart, [Row(row["weight"], row["kl_divergence"]) for row in costs["matrices"]], costs["kl_divergence"])
    yield f"Drawn: {chart}."


def place(weight: str) -> tuple[int, str] | None:
    """The layer and the kind of a matrix, by its name: model.layers.3.mlp.up_proj.weight is an up_proj of layer 3."""
    found = _LAYER.search(weight)
    if found is None:
        return None
    rest = _ENDINGS.sub("", weight[found.end() :]).removesuffix(".weight").split(".")
    return int(found[1]), ".".join(rest[-2:]) if rest[-1].isdigit() else rest[-1]


def draw(path: Path, rows: Sequence[Row], together: float) -> None:
    """Writes a PNG of rows, worst first, and the cost of all `together`."""
    worst = rows[:_BARS]
    placed = [(row, *where) for row in rows if (where := place(row.weight)) is not None]
    layers, kinds = sorted({layer for _, layer, _ in placed}), _kinds(placed)
    width, height = max(4.5, 2 + 0.75 * len(kinds)), max(4.8, 1.8 + 0.26 * len(layers))
    figure = Figure(figsize=(width + 7, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"KL divergence from float32 in nats, one matrix quantized at a time; all together {together:.2g}")
    left, right = figure.subplots(1, 2, width_ratios=[width, 7])
    cells = np.full((len(layers), len(kinds)), np.nan)
    for row, layer, kind in placed:
        y, x = layers.index(layer), kinds.index(kind)
        cells[y, x] = np.nanmax([cells[y, x], row.kl_divergence])
    _heat_map(left, cells, layers, kinds)
    _bars(right, worst)
    figure.savefig(path, dpi=110, format="png")


def _kinds(placed: Sequence[tuple[Row, int, str]]) -> list[str]:
    """Kinds in the order in which a layer has them: the table is sorted by cost, so names say it."""
    usual = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "q", "k", "v", "o")
    found = {kind for _, _, kind in placed}
    return [kind for kind in usual if kind in found] + sorted(found.difference(usual))


def _heat_map(axes: Any, cells: np.ndarray, layers: list[int], kinds: list[str]) -> None:
    known = cells[np.isfinite(cells) & (cells > 0)]
    if not known.size:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no matrix belongs to a layer by its name", ha="center", transform=axes.transAxes)
        return
    top = float(known.max())
    bottom = min(max(float(known.min()), top / 10**_DECADES), top / 10)
    image = axes.imshow(
        np.clip(cells, bottom, None), aspect="auto", cmap="viridis", norm=LogNorm(bottom, top), interpolation="nearest"
    )
    axes.set_xticks(range(len(kinds)), kinds, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_ylabel("layer")
    axes.figure.colorbar(image, ax=axes, label="nats", pad=0.02)


def _bars(axes: Any, worst: Sequence[Row]) -> None:
    floor = np.finfo(np.float64).tiny
    costs = [max(row.kl_divergence, floor) for row in worst]
    bars = axes.barh(range(len(worst)), costs, color="#3b6ea5")
    axes.bar_label(bars, [f"{row.kl_divergence:.1e}" for row in worst], padding=3)
    axes.set_yticks(range(len(worst)), [_shortened(row.weight) for row in worst], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * max(costs))
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
    axes.set_xlabel("nats")
    axes.set_title(f"the {len(worst)} worst of all matrices", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]

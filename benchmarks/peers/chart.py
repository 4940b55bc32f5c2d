"""What was measured, as a chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from .results import EXACT, Row
from .speed import SHORT, Ratio

COLORS = {
    "pastkey": "#08519c",
    "genai": "#d95f0e",
    "llama": "#31a354",
    "optimum": "#756bb1",
    "transformers": "#636363",
}


def draw(rows: Sequence[Row], file: Path) -> None:
    """Decode speed over the fastest int8 peer's, against KL divergence on a logarithmic axis; a dot's area is size."""
    divergences = [row.quality.kl_divergence for row in rows if row.quality.kl_divergence >= EXACT]
    exact = min(divergences, default=1e-2) / 10  # where float32's own stand: a logarithm has no place for 0
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    dots = []
    for row in rows:
        found, color = row.ratios[SHORT.prompt, "decode"], COLORS[row.engine.runtime]
        x = row.quality.kl_divergence if row.quality.kl_divergence >= EXACT else exact
        area = row.size / 1e6 * 1.5  # points², of 1.5 per MB
        axes.scatter(x, found.median, s=area, color=color, alpha=0.6, linewidths=0)
        axes.vlines(x, found.low, found.high, color=color, lw=1.5)
        dots.append(_Dot(x, found, area, f"{row.engine.title}, {row.size / 1e6:.0f} MB", color))
    axes.axhline(1, color="#bbbbbb", lw=0.8, ls="--", zorder=0)
    axes.set_xlim(exact / 2.5, max(divergences, default=1e-2) * 4)
    axes.set_ylim(0, max(row.ratios[SHORT.prompt, "decode"].high for row in rows) * 1.15)
    left, right = exact * 3, axes.get_xlim()[1]
    steps = (1, 2, 5) if right < 100 * left else (1,)
    ticks = [step * 10.0**n for n in range(-7, 3) for step in steps if left <= step * 10.0**n <= right]
    axes.xaxis.set_major_locator(FixedLocator([exact, *ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "0 (float32)" if x == exact else f"{x:g}"))
    axes.set_xlabel("KL divergence from float32 (nats per token; less is better)")
    axes.set_ylabel("decode speed, fastest int8 peer = 1")
    axes.set_title(
        f"Decode of {SHORT.new} tokens after {SHORT.prompt}; area of a dot: size of the files, line: range", fontsize=11
    )
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    _label(figure, dots)
    canvas.print_png(str(file))


@dataclass(frozen=True)
class _Dot:
    x: float
    y: Ratio
    area: float  # points²
    text: str
    color: str

    @property
    def radius(self) -> float:
        """In points."""
        return float((self.area / math.pi) ** 0.5)


def _label(figure: Figure, dots: Sequence[_Dot]) -> list[Bbox]:
    """Writes each dot's label at the nearest place where it covers no dot, no range and no other label.

    Returns the places of the labels, in pixels.
    """
    (axes,) = figure.axes
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    taken = []
    for dot in dots:
        radius = dot.radius * figure.dpi / 72
        (px, py), ends = axes.transData.transform((dot.x, dot.y.median)), [(dot.x, dot.y.low), (dot.x, dot.y.high)]
        (_, low), (_, high) = axes.transData.transform(ends)
        taken.append(Bbox.from_extents(px - radius, py - radius, px + radius, py + radius))
        taken.append(Bbox.from_extents(px - 1, low, px + 1, high))
    labels: list[Bbox] = []
    for dot in dots:
        near = dot.radius + 4  # points from the middle of the dot
        places = [
            (dx * distance, dy * distance)
            for distance in (near, near + 12, near + 24, near + 36, near + 48)
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (0.8, -0.8), (-0.8, 0.8), (-0.8, -0.8))
        ]
        for dx, dy in places:
            label = axes.annotate(
                dot.text,
                (dot.x, dot.y.median),
                (dx, dy),
                textcoords="offset points",
                fontsize=8.5,
                color=dot.color,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="center" if dy == 0 else "bottom" if dy > 0 else "top",
            )
            box = label.get_window_extent(renderer)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and box.y0 >= axes.bbox.y0
            if inside and box.y1 <= axes.bbox.y1 and not any(map(box.overlaps, taken + labels)):
                break
            if (dx, dy) != places[-1]:
                label.remove()
        labels.append(box)
    return labels

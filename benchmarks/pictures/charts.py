"""Charts, drawn from the tables of a page or from curves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.measure import NOT_TOLD, Spread, rows_of

COLORS = {
    "pastkey": "#08519c",
    "onnxruntime-genai": "#d95f0e",
    "llama": "#31a354",
    "openvino": "#c51b8a",
    "mistral": "#8c6d31",
    "optimum": "#756bb1",
    "transformers": "#636363",
}
MARKERS, LINES = "osD^v", ("-", "--", ":")  # the engines of one program, in turn


def draw_results(page: str, file: Path) -> None:
    """Decode speed over the fastest int8 peer's, against KL divergence on a logarithmic axis; an area is a size."""
    error, ratios = "KL divergence (nats)", {row["engine"]: row for row in rows_of(page, "engine", 1)}
    rows = [row for row in rows_of(page, "engine") if row[error] != NOT_TOLD]
    found = {row["engine"]: float(row[error]) for row in rows}
    exact = min((kl for kl in found.values() if kl), default=1e-2) / 10  # a logarithm has no place for 0
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    entries, seen = [], Counter[str]()
    for row in rows:
        title, size, x = row["engine"], float(row["MB"]), found[row["engine"]] or exact
        speed = spread_of(ratios[title]["decode 512"])
        program = _program(title)
        color, marker = COLORS[program], MARKERS[seen[program] % len(MARKERS)]
        seen[program] += 1
        axes.scatter(x, speed.median, s=size * 1.5, color=color, marker=marker, alpha=0.6, linewidths=0)
        axes.vlines(x, speed.low, speed.high, color=color, lw=1.5)
        entries.append(Line2D([], [], linestyle="", color=color, marker=marker, label=f"{title}, {size:.0f} MB"))
    axes.axhline(1, color="#bbbbbb", lw=0.8, ls="--", zorder=0)
    axes.set_xlim(exact / 2.5, max(*found.values(), exact * 10) * 4)
    axes.set_ylim(0)
    axes.xaxis.set_major_locator(FixedLocator([exact, *(10.0**n for n in range(-6, 3) if 10.0**n > 2 * exact)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: "0 (float32)" if x == exact else f"{x:g}")
    axes.set_xlabel("KL divergence from float32 (nats per token; less is better)")
    axes.set_ylabel("decode speed, fastest int8 peer = 1")
    axes.set_title("Decode of 128 tokens after 512; area: size of the files, line: range", fontsize=11)
    figure.legend(handles=entries, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    _finish(figure, [axes], file)


def draw_streams(page: str, file: Path) -> None:
    """Tokens per second and the longest wait for a first token, by streams."""
    speeds, waits = rows_of(page, "streams"), rows_of(page, "streams", page.count("\n| streams |") - 2)
    figure = Figure(figsize=(10, 4.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    counts, seen = [float(count) for count in [*speeds[0]][1:]], Counter[str]()
    for speed, wait in zip(speeds, waits, strict=True):
        title, program = speed["streams"], _program(speed["streams"])
        place = seen[program]
        seen[program] += 1
        style = {"color": COLORS[program], "linestyle": LINES[place], "marker": MARKERS[place], "markersize": 4}
        left.plot(counts, [float(cell.split()[0]) for cell in [*speed.values()][1:]], label=title, **style)
        right.plot(counts, [float(cell.split()[1]) for cell in [*wait.values()][1:]], **style)
    left.set_title("tokens per second, all streams together", fontsize=10)
    left.set_ylim(0)
    right.set_title("seconds until the last stream has its first token", fontsize=10)
    right.set_yscale("log")
    right.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    right.yaxis.set_minor_formatter(lambda *_: "")
    for axes in (left, right):
        _logarithmic(axes, counts, base=2)
        axes.set_xlabel("streams at the same time")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False, handlelength=3.5)
    _finish(figure, [left, right], file)


def draw_training(page: str, file: Path) -> None:
    """Bits per byte of the held-out text over the seconds of training, a panel for each text."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows_of(page, "trained by"):
        points = curves.setdefault(row["text"], {}).setdefault(row["trained by"], [])
        points.append((float(row["seconds"]), float(row["bits per byte"])))
    figure = Figure(figsize=(3.4 * len(curves), 3.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (text, arms) in zip(panels, curves.items(), strict=True):
        for (arm, points), color in zip(arms.items(), (COLORS["transformers"], COLORS["pastkey"]), strict=True):
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, label=arm)
        last = [points[-1][1] for points in arms.values()]
        axes.set_ylim(min(last) - 0.1, max(last) + 1)  # the first steps are far above
        axes.set_xlim(0)
        axes.set_title(text, fontsize=10)
        axes.set_xlabel("seconds")
    panels[0].set_ylabel("bits per byte of the held-out text")
    panels[0].legend(fontsize=8, frameon=False)
    _finish(figure, panels, file)


def curve(points: Mapping[int, Spread], title: str, axis: str, unit: str, file: Path) -> None:
    """Figures over a logarithmic axis; the other one is logarithmic as well where it must hold much."""
    figure = Figure(figsize=(6.5, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    xs = [*points]
    median, low, high = zip(*points.values(), strict=True)
    axes.fill_between(xs, low, high, color=COLORS["pastkey"], alpha=0.2, linewidth=0)
    axes.plot(xs, median, color=COLORS["pastkey"], marker="o", markersize=4)
    for x, y in zip(xs, median, strict=True):
        axes.annotate(f"{y:.3g}", (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    if max(high) > 20 * min(low):
        axes.set_yscale("log")
        axes.set_ylim(min(low) / 1.5, max(high) * 1.6)
    else:
        axes.set_ylim(0, max(high) * 1.15)
    _logarithmic(axes, xs)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(axis)
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=9)
    _finish(figure, [axes], file)


def spread_of(cell: str) -> Spread:
    """Of a cell such as 1.76 (1.11 to 2.45)."""
    median, low, _, high = cell.replace("(", "").replace(")", "").split()
    return Spread(float(median), float(low), float(high))


def _program(title: str) -> str:
    return next(name for name in COLORS if title.startswith(name))


def _logarithmic(axes: Axes, xs: Sequence[float], base: int = 10) -> None:
    axes.set_xscale("log", base=base)
    axes.xaxis.set_major_locator(FixedLocator([*xs]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:.3g} M" if x >= 1e5 else f"{x:g}")


def _finish(figure: Figure, panels: Sequence[Axes], file: Path) -> None:
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(str(file))

"""Draws one panel as a PNG, for a document. The numbers are those of the page."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Panels = dict[str, Any]
_HEAT, _COLD = "#2451a6", "#b04b18"


def picture(panels: Panels, name: str, place: int) -> bytes:
    """Returns the PNG of a panel, where that is one position's, after the shown token `place`."""
    figure = Figure(layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    _DRAW[name](figure, panels, place)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _words(panels: Panels, places: Any) -> list[str]:
    texts = (panels["vocabulary"][place] for place in np.ravel(places))
    return [text.replace("\n", "⏎").replace("$", r"\$") for text in texts]


def _embedding(figure: Figure, panels: Panels, _: int) -> None:
    found = panels["embedding"]
    titles = {"word": "word embedding", "position": "+ position encoding", "sum": "= what the first layer reads"}
    parts = found["parts"] if found is not None else {}
    words = _words(panels, panels["text"]["ids"])[: len(panels["text"]["surprise"])]
    figure.set_size_inches(7, 0.6 + len(parts) * (0.6 + 0.22 * len(words)))
    every = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
    most = max(float(np.abs(rows).max()) for rows in parts.values())
    for axes, (kind, rows) in zip(every, parts.items(), strict=True):
        drawn = axes.imshow(rows, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
        axes.set_yticks(range(len(words)), words)
        axes.set_xticks([])
        axes.set_title(titles[kind], fontsize=10, loc="left")
    every[-1].set_xlabel(f"channels 1 to {rows.shape[1]} of {found['channels']}")
    figure.colorbar(drawn, ax=list(every), shrink=0.5)


def _attention(figure: Figure, panels: Panels, _: int) -> None:
    found = panels["attention"]
    weights, calls, heads = found["weights"], found["calls"], found["heads"]
    words = _words(panels, panels["text"]["ids"])[: weights.shape[2]]
    columns = ["earlier", *words] if weights.shape[3] > len(words) else words
    size = max(2.2, 0.5 + 0.3 * len(words))
    figure.set_size_inches(size * len(heads) + 0.6, size * len(calls))
    every = figure.subplots(len(calls), len(heads), squeeze=False)
    for (row, column), axes in np.ndenumerate(every):
        shown = weights[row, column]
        read, known = shown.shape
        hidden = ~np.tri(read, known, known - read, dtype=bool)
        axes.imshow(np.ma.masked_array(shown, hidden), cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"layer {calls[row] + 1}, head {heads[column] + 1}", fontsize=10)
        axes.set_yticks(range(len(words)), words)
        axes.set_xticks(range(len(columns)), columns, rotation=90)
        for (y, x), weight in np.ndenumerate(shown) if len(words) <= 12 else ():
            if not hidden[y, x]:
                ink = "white" if weight > 0.5 else "black"
                axes.text(x, y, f"{100 * weight:.0f}", ha="center", va="center", fontsize=8, color=ink)


def _layers(figure: Figure, panels: Panels, _: int) -> None:
    found = [(place, layer) for place, layer in enumerate(panels["layers"]["at"]) if layer is not None]
    words = _words(panels, panels["text"]["ids"])[1:]
    axes = _sized(figure, max(5, 1 + 0.55 * len(words)), 1.2 + 0.35 * len(found))
    axes.imshow(np.stack([layer["next"] for _, layer in found]), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(len(found)), [f"after layer {place}" if place else "before layer 1" for place, _ in found])
    axes.set_xticks(range(len(words)), words, rotation=60, ha="right")
    for y, (_, layer) in enumerate(found) if len(words) <= 24 else ():
        for x, chance in enumerate(layer["next"]):
            ink = "white" if chance > 0.5 else "black"
            axes.text(x, y, f"{100 * chance:.0f}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_xlabel("the token that came next, and its probability in %")


def _next(figure: Figure, panels: Panels, place: int) -> None:
    models = {panels["model"]["precision"]: panels["next"]["p"][place]}
    other = panels.get("reference")
    if other is not None:
        models[f"{other['name']} (KL {other['kl'][place]:.1e} nats)"] = other["p"][place]
    words = _words(panels, panels["next"]["ids"][place])
    axes = _sized(figure, 6, 0.8 + 0.28 * len(words) * len(models))
    for number, (name, chances) in enumerate(models.items()):
        rows = np.arange(len(words)) * (len(models) + 0.5) + number
        axes.barh(rows, chances, label=name, color=(_HEAT, _COLD)[number])
        for row, chance in zip(rows, chances, strict=True):
            axes.text(chance, row, f" {100 * chance:.1f} %", va="center", fontsize=8)
    axes.set_yticks(np.arange(len(words)) * (len(models) + 0.5) + (len(models) - 1) / 2, words)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15)
    read = " ".join(word.strip() for word in _words(panels, panels["text"]["ids"][: place + 1]))
    axes.set_xlabel(f"probability of coming after “{read[-40:]}”")
    if other is not None:
        axes.legend(fontsize=8)


def _sized(figure: Figure, width: float, height: float) -> Axes:
    figure.set_size_inches(min(width, 14), height)
    return figure.subplots()


_DRAW = {"embedding": _embedding, "attention": _attention, "layers": _layers, "next": _next}

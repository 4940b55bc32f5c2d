"""Draws one panel as a PNG, for a document. The numbers are those of the page."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from pastkey.errors import InputError

Panels = dict[str, Any]
_COLORS = ("#2451a6", "#b04b18")


def picture(panels: Panels, name: str) -> bytes:
    """Returns the PNG of a panel, where that is one position's, at the page's. Raises InputError if it is empty."""
    empty = {
        "embedding": panels["embedding"] is None,
        "layers": not any(panels["layers"]["at"]),
        "reference": "reference" not in panels,
    }
    if empty.get(name):
        why = "no --reference is given" if name == "reference" else "this decoder has no single vector for each token"
        raise InputError(f"there is no panel {name}: {why}")
    figure = Figure(layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    _DRAW[name](figure, panels, panels["text"]["at"])
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


# --- the panels ---------------------------------------------------------------------------------------------------
def _tokens(figure: Figure, panels: Panels, _: int) -> None:
    words = _words(panels, panels["text"]["ids"])[1:]
    _bars(figure, words, {"": panels["text"]["surprise"]}, "%.1f", "surprise in bits: 0 is expected, 8 is 1 in 256")


def _embedding(figure: Figure, panels: Panels, _: int) -> None:
    found = panels["embedding"]
    titles = {"word": "word embedding", "position": "+ position encoding", "sum": "= what the first layer reads"}
    words = _read(panels)
    figure.set_size_inches(7, 0.6 + len(found["parts"]) * (0.6 + 0.22 * len(words)))
    every = figure.subplots(len(found["parts"]), 1, squeeze=False)[:, 0]
    most = max(float(np.abs(rows).max()) for rows in found["parts"].values())
    for axes, (kind, rows) in zip(every, found["parts"].items(), strict=True):
        drawn = axes.imshow(rows, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
        axes.set_yticks(range(len(words)), words)
        axes.set_xticks([])
        axes.set_title(titles[kind], fontsize=10, loc="left")
    every[-1].set_xlabel(f"channels 1 to {rows.shape[1]} of {found['channels']}")
    figure.colorbar(drawn, ax=list(every), shrink=0.5)


def _attention(figure: Figure, panels: Panels, _: int) -> None:
    found, words = panels["attention"], _read(panels)
    weights, calls, heads = found["weights"], found["calls"], found["heads"]
    read, known = weights.shape[2:]
    size = max(2.2, 0.5 + 0.3 * read)
    if size * max(len(heads), len(calls)) > _WIDEST:
        raise InputError(
            f"a picture of {len(calls)} layers and {len(heads)} heads over {read} tokens is too large: choose some by "
            "--layers, --heads and --last"
        )
    figure.set_size_inches(size * len(heads) + 0.6, size * len(calls))
    later = ~np.tri(read, known, known - read, dtype=bool)
    every = figure.subplots(len(calls), len(heads), squeeze=False)
    for (row, column), axes in np.ndenumerate(every):
        shares = np.ma.masked_array(weights[row, column], later)
        _shares(axes, shares, words, ["earlier", *words][-known:], _percent if read <= 12 else None)
        axes.set_title(f"layer {calls[row] + 1}, head {heads[column] + 1}", fontsize=10)


def _layers(figure: Figure, panels: Panels, _: int) -> None:
    found = {place: layer["next"] for place, layer in enumerate(panels["layers"]["at"]) if layer is not None}
    words = _words(panels, panels["text"]["ids"])[1:]
    axes = _sized(figure, max(5, 1 + 0.55 * len(words)), 1.2 + 0.35 * len(found))
    names = [f"after layer {place}" if place else "before layer 1" for place in found]
    _shares(axes, np.stack([*found.values()]), names, words, _percent if len(words) <= 24 else None)
    axes.set_xlabel("the token that came next, and its probability in %")


def _next(figure: Figure, panels: Panels, place: int) -> None:
    words = _words(panels, panels["next"]["ids"][place])
    models = {panels["model"]["precision"]: panels["next"]["p"][place]}
    other = panels.get("reference")
    if other is not None:
        models[f"{other['name']} (KL {other['kl'][place]:.1e} nats)"] = other["p"][place]
    read = " ".join(word.strip("␣") for word in _read(panels)[: place + 1])
    shares = {name: 100 * chances for name, chances in models.items()}
    _bars(figure, words, shares, "%.1f %%", f"probability of coming after “{read[-40:]}”")


def _sampler(figure: Figure, panels: Panels, place: int) -> None:
    step = panels["sampler"]["at"][place]
    stages = [f"{name.replace('_', ' ')}\n{kept} left" for name, kept in zip(step["names"], step["kept"], strict=True)]
    words = _words(panels, step["ids"])
    axes = _sized(figure, 2 + 0.9 * len(stages), 1.2 + 0.3 * len(words))
    shares = np.ma.masked_equal(step["p"].T, 0)
    _shares(axes, shares, words, stages, _percent)


def _cache(figure: Figure, panels: Panels, _: int) -> None:
    words, prompt, first = _read(panels), panels["text"]["prompt"], panels["text"]["first"]
    read = np.arange(max(prompt, first + 1), first + len(words) + 1)  # tokens that are read after each step
    new = np.arange(first, first + len(words)) >= np.where(read > prompt, read - 1, 0)[:, None]
    later = np.arange(first, first + len(words)) >= read[:, None]
    axes = _sized(figure, max(5, 1 + 0.55 * len(words)), 1.2 + 0.35 * len(read))
    steps = [f"step {number - prompt + 1}" for number in read]
    states = np.ma.masked_array(np.where(new, 1.0, 0.3), later)
    _shares(axes, states, steps, words, (lambda state: "new" if state == 1 else "old") if len(words) <= 24 else None)
    axes.set_xlabel("keys and values: computed in this step (new), or from the cache (old)")


def _reference(figure: Figure, panels: Panels, _: int) -> None:
    found, words = panels["reference"], _words(panels, panels["text"]["ids"])[1:]
    _bars(figure, words, {"": found["kl"]}, "%.1e", f"KL divergence from {found['name']} in nats, for this next token")


# --- their parts --------------------------------------------------------------------------------------------------
_WIDEST = 60  # inches


def _sized(figure: Figure, width: float, height: float) -> Axes:
    figure.set_size_inches(min(width, _WIDEST), height)
    return figure.subplots()


def _bars(figure: Figure, words: list[str], models: Mapping[str, Any], form: str, label: str) -> None:
    """A bar per word, and beside it one for each further model."""
    axes, apart = _sized(figure, 6, 0.8 + 0.28 * len(words) * len(models)), len(models) + 0.5
    for number, (name, lengths) in enumerate(models.items()):
        drawn = axes.barh(np.arange(len(words)) * apart + number, lengths, label=name, color=_COLORS[number])
        axes.bar_label(drawn, fmt=form, padding=3, fontsize=8)
    axes.set_yticks(np.arange(len(words)) * apart + (len(models) - 1) / 2, words)
    axes.set_ylim(len(words) * apart, -1)
    axes.set_xlim(0, 1.2 * max(1e-9, *(float(np.max(lengths)) for lengths in models.values())))
    axes.set_xlabel(label)
    if len(models) > 1:
        axes.legend(fontsize=8)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _shares(
    axes: Axes,
    shares: npt.NDArray[Any],
    rows: Sequence[str],
    columns: Sequence[str],
    text: Callable[[float], str] | None,
) -> None:
    """A heat map of numbers from 0 to 1, each with its text. Masked ones are empty."""
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor")
    for (y, x), share in np.ndenumerate(shares):
        if text is not None and not np.ma.getmaskarray(shares)[y, x]:
            color = "white" if share > 0.5 else "black"
            axes.text(x, y, text(share), ha="center", va="center", fontsize=8, color=color)


@functools.cache
def _letters() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def _words(panels: Panels, places: Any) -> list[str]:
    """The tokens' texts; letters that matplotlib's own font lacks are their codes."""
    texts = (panels["vocabulary"][place] for place in np.ravel(places))
    known = ("".join(c if ord(c) in _letters() else f"U+{ord(c):04X}" for c in text) for text in texts)
    return [text.replace("$", r"\$") for text in known]  # which would begin a formula


def _read(panels: Panels) -> list[str]:
    return _words(panels, panels["text"]["ids"])[:-1]


_DRAW = {
    "tokens": _tokens, "embedding": _embedding, "attention": _attention, "layers": _layers, "next": _next,
    "sampler": _sampler, "cache": _cache, "reference": _reference,
}  # fmt: skip

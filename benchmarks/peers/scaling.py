"""How pastkey's int8 scales: with the length of the context, with rows, with threads, and with the model's size.

python -m benchmarks.peers.scaling WIDTH LAYERS OUT    exports one decoder of random weights, as `sizes` has it done
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from pastkey.command import say
from pastkey.contract.bundle import open_bundle
from pastkey.contract.config import ModelConfig
from pastkey.errors import PastkeyError
from pastkey.runtime import Engine

from .convert import remove, run
from .engines import EngineError, Prepared
from .environments import versions_of
from .progress import steps
from .store import Store

ROUNDS = 5  # of every point, interleaved
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8000)  # tokens
BATCHES = (1, 2, 4, 8, 16)  # rows
SIZES = ((64, 8), (128, 12), (256, 12), (512, 10), (768, 15), (1024, 17), (1536, 19))  # width, layers: 1 to 500 million
VOCAB, NEW = 8192, 32  # tokens, of random models and of every decode

Seconds = Callable[[], float]  # of one token, or of one step


@dataclass(frozen=True)
class Curve:
    """Milliseconds over one axis: the median of the rounds at each point, and their range."""

    name: str  # of its file: docs/performance-NAME.png
    title: str
    axis: str
    unit: str
    points: dict[float, tuple[float, float, float]]  # x -> median, least, most


def measure(int8: Prepared, threads: int, store: Store, folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Draws all curves into `folder`. Returns the files, and for each size that could not be exported the reason."""
    bundle = open_bundle(int8.model)
    key = {"engine": int8.identity, "threads": threads, "new": NEW}
    room = bundle.manifest.context_length - NEW
    session = Engine(bundle, threads=threads)
    cores = os.cpu_count() or 1
    counts = sorted({cores, *(2**n for n in range(cores.bit_length()) if 2**n <= cores)})
    contexts = {length: lambda length=length: after(session, length) for length in CONTEXTS if length <= room}
    batches = {rows: lambda rows=rows: together(session, rows) for rows in BATCHES}
    sessions = {count: Engine(bundle, threads=count) for count in counts}
    by_threads = {count: lambda one=one: after(one, 512) for count, one in sessions.items()}
    models, skipped = sizes(threads, store)
    order_by_magnitude = {parameters: lambda one=one: after(one, 128) for parameters, one in models.items()}
    versions = versions_of("pastkey", Path(sys.executable))
    curves = [
        curve(
            "context", "One token, by what is in the cache", "tokens in the cache", "ms per token", contexts, key, store
        ),
        curve("batch", "One step of several rows, 64 tokens each", "rows", "ms per step", batches, key, store),
        curve("threads", "One token after 512, by threads", "threads", "ms per token", by_threads, key, store),
        curve(
            "sizes",
            "One token after 128, by the model's size (random weights)",
            "parameters",
            "ms per token",
            order_by_magnitude,
            {"versions": versions, "threads": threads, "new": NEW},
            store,
        ),
    ]
    files = [folder / f"performance-{one.name}.png" for one in curves]
    for one, file in zip(curves, files, strict=True):
        draw(one, file)
    return files, skipped


# --- what is timed ------------------------------------------------------------------------------------------------
def after(session: Engine, length: int, new: int = NEW) -> float:
    """Seconds of one token behind `length` others: the median of `new`."""
    session.reset()
    ids = np.random.default_rng(0).integers(0, session.manifest.vocab_size, length + new)
    session.prefill(ids[:length])
    return statistics.median(_seconds(partial(session.decode, token)) for token in ids[length:].tolist())


def together(session: Engine, rows: int, past: int = 64, new: int = NEW) -> float:
    """Seconds of one step that appends a token to each of `rows` rows of `past`: the median of `new`."""
    session.reset()
    ids = np.random.default_rng(0).integers(0, session.manifest.vocab_size, (rows, past + new))
    session.forward(ids[:, :past])
    columns = [ids[:, i : i + 1] for i in range(past, past + new)]
    return statistics.median(_seconds(partial(session.forward, column)) for column in columns)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def curve(
    name: str,
    title: str,
    axis: str,
    unit: str,
    points: Mapping[int, Seconds],
    key: Mapping[str, object],
    store: Store,
) -> Curve:
    """Times all points in every round, each once before to warm up."""
    taken: dict[int, list[float]] = {x: [] for x in points}
    warm: set[int] = set()

    def timed(x: int) -> float:
        if x not in warm:
            points[x]()
            warm.add(x)
        return points[x]()

    for number in steps(range(ROUNDS), f"scaling by {name}, rounds"):
        for x in points:
            taken[x].append(store.once(f"scaling-{name}-{x}-{number}", key, partial(timed, x)))
    found: dict[float, tuple[float, float, float]] = {
        x: (1e3 * statistics.median(times), 1e3 * min(times), 1e3 * max(times)) for x, times in taken.items()
    }
    return Curve(name, title, axis, unit, found)


# --- models of growing size ---------------------------------------------------------------------------------------
def sizes(threads: int, store: Store) -> tuple[dict[int, Engine], dict[str, str]]:
    """parameters -> a session of a random model, and for each that this machine cannot export the reason."""
    sessions, skipped = {}, {}
    versions = versions_of("pastkey", Path(sys.executable))
    for width, layers in SIZES:
        out = store.models / f"random-{width}-{layers}"

        def make(width: int = width, layers: int = layers, out: Path = out) -> None:
            say(f"export a random model of width {width} with {layers} layers")
            remove(out)
            command = [sys.executable, "-m", "benchmarks.peers.scaling", str(width), str(layers), str(out)]
            run(command, store.logs / f"{out.name}.log")

        try:
            store.once(out.name, {"versions": versions, "vocab": VOCAB}, make, product=out)
        except EngineError as error:
            skipped[f"a model of {parameters(width, layers) / 1e6:.0f} million parameters"] = str(error)
            say(f"without {out.name}: {error}")
        else:
            sessions[parameters(width, layers)] = Engine(open_bundle(out), threads=threads)
    return sessions, skipped


def configuration(width: int, layers: int) -> ModelConfig:
    heads = width // 64
    return ModelConfig(
        vocab_size=VOCAB,
        max_position_embeddings=512,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4 or 1,
        head_dim=64,
    )


def parameters(width: int, layers: int) -> int:
    """Of the matrices; the norms' are few."""
    config = configuration(width, layers)
    attention = 2 * width * 64 * (config.num_attention_heads + config.num_key_value_heads)
    return VOCAB * width + layers * (attention + 3 * width * config.intermediate_size)


def export_random(width: int, layers: int, out: Path) -> None:
    """A bundle of a decoder of our own kind with random weights."""
    import torch

    from pastkey.export import export
    from pastkey.export.resources import require_memory
    from pastkey.train.model import Decoder

    require_memory(parameters(width, layers))
    torch.manual_seed(0)
    config = configuration(width, layers)
    model = Decoder(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # zero before training
            torch.nn.init.normal_(weight, std=0.5 * weight.shape[1] ** -0.5)
    export(model, out, context_length=config.max_position_embeddings)


# --- charts -------------------------------------------------------------------------------------------------------
def draw(curve: Curve, file: Path) -> None:
    """One curve over a logarithmic axis, with its figures; so is the other where it must hold much."""
    figure = Figure(figsize=(6.5, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    xs = list(curve.points)
    median, low, high = zip(*curve.points.values(), strict=True)
    axes.fill_between(xs, low, high, color="#08519c", alpha=0.2, linewidth=0)
    axes.plot(xs, median, color="#08519c", marker="o", markersize=4)
    for x, y in zip(xs, median, strict=True):
        axes.annotate(f"{y:.3g}", (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xscale("log")
    if max(high) > 20 * min(low):
        axes.set_yscale("log")
        axes.set_ylim(min(low) / 1.5, max(high) * 1.6)
    else:
        axes.set_ylim(0, max(high) * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(xs))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:.3g} M" if x >= 1e5 else f"{x:g}")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(curve.axis)
    axes.set_ylabel(curve.unit)
    axes.set_title(f"{curve.title}; median and range of {ROUNDS} rounds", fontsize=9)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    FigureCanvasAgg(figure).print_png(str(file))


def main(arguments: Sequence[str]) -> int:
    """One export in a process of its own, whose memory ends with it."""
    try:
        export_random(int(arguments[0]), int(arguments[1]), Path(arguments[2]))
    except (PastkeyError, MemoryError) as error:
        say(str(error) or "not enough memory")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

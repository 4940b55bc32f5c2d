"""How pastkey's int8 scales: with the length of the context, with rows, with threads, and with the model's size."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.measure import WORK, Answer, Spread, Table, facts_of, fresh, interleaved, own_version, seconds
from benchmarks.pictures.charts import curve
from benchmarks.store import Store
from pastkey.command import say
from pastkey.contract.bundle import open_bundle
from pastkey.contract.config import ModelConfig
from pastkey.errors import PastkeyError
from pastkey.runtime import Engine

from .convert import of_bundle, open_source, prepare, remove
from .engines import ENGINES

CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8000)  # tokens
BATCHES = (1, 2, 4, 8, 16)  # rows
SIZES = ((64, 8), (128, 12), (256, 12), (512, 10), (768, 15), (1024, 17), (1536, 19))  # width, layers: 1 to 500 million
VOCAB = 8192  # of random models

Points = dict[int, Callable[[int], float]]  # x -> seconds of a round


def scaling(
    bundle: Path | None = None,
    *,
    threads: int = 2,
    rounds: int = 5,
    new_tokens: int = 32,
    sizes: int = 7,
    charts: Path | None = None,
    work: Path = WORK,
) -> Answer:
    """Arms: the points of each curve, which is drawn into --charts. Metric: milliseconds."""
    store = Store(work)
    int8 = prepare(ENGINES[0], open_source(None), store) if bundle is None else of_bundle(ENGINES[0], bundle)
    opened, new = open_bundle(int8.model), new_tokens
    room, cores = opened.manifest.context_length - new, os.cpu_count() or 1
    engine = Engine(opened, threads=threads)
    counts = sorted({cores, *(2**n for n in range(cores.bit_length()) if 2**n <= cores)})
    models, skipped = random_models(sizes, threads, store)
    axes: dict[str, tuple[str, str, str, Points]] = {
        "context": (
            "One token, by what is in the cache",
            "tokens in the cache",
            "ms per token",
            {length: partial(after, engine, length, new) for length in CONTEXTS if length <= room},
        ),
        "batch": (
            "One step of several rows, 64 tokens each",
            "rows",
            "ms per step",
            {rows: partial(together, engine, rows, min(64, room), new) for rows in BATCHES},
        ),
        "threads": (
            "One token after 512, by threads",
            "threads",
            "ms per token",
            {n: partial(after, Engine(opened, threads=n), min(512, room), new) for n in counts},
        ),
        "sizes": (
            "One token after 128, by the model's size (random weights)",
            "parameters",
            "ms per token",
            {size: partial(after, one, 128, new) for size, one in models.items()},
        ),
    }
    once = partial(store.once, key=[int8.identity, threads, new, [*models]])
    for name, (title, axis, unit, points) in axes.items():
        if not points:
            continue
        arms = {str(x): arm for x, arm in points.items()}
        measured = interleaved(arms, rounds, f"scaling {name}", once=once)
        found = {x: Spread.of(1e3 * one[str(x)] for one in measured) for x in points}
        chart = f"{title}; median and range of {rounds} rounds"
        curve(found, chart, axis, unit, (charts or store.folder) / f"performance-{name}.png")
        yield Table(f"{title}:", [axis, unit], [[f"{x}", f"{spread}"] for x, spread in found.items()])
    yield from skipped
    yield facts_of(opened, threads)


def after(engine: Engine, length: int, new: int, _: int) -> float:
    """Seconds of one token behind `length` others: the median of `new`."""
    engine.reset()
    ids = np.random.default_rng(0).integers(0, engine.manifest.vocab_size, length + new)
    engine.prefill(ids[:length])
    return statistics.median(seconds(partial(engine.decode, token)) for token in ids[length:].tolist())


def together(engine: Engine, rows: int, past: int, new: int, _: int) -> float:
    """Seconds of one step that appends a token to each of `rows` rows of `past`: the median of `new`."""
    engine.reset()
    ids = np.random.default_rng(0).integers(0, engine.manifest.vocab_size, (rows, past + new))
    engine.forward(ids[:, :past])
    columns = [ids[:, i : i + 1] for i in range(past, past + new)]
    return statistics.median(seconds(partial(engine.forward, column)) for column in columns)


# --- models of growing size ---------------------------------------------------------------------------------------
def random_models(count: int, threads: int, store: Store) -> tuple[dict[int, Engine], list[str]]:
    """parameters -> an engine of a random model, and a sentence for each that this machine cannot export."""
    engines, skipped = {}, []
    for width, layers in SIZES[:count]:
        out = store.models / f"random-{width}-{layers}"

        def make(width: int = width, layers: int = layers, out: Path = out) -> None:
            say(f"export a random model of width {width} with {layers} layers")
            remove(out)
            fresh(export_random, width, layers, out)  # whose memory ends with it

        try:
            store.once(out.name, make, key=[own_version(), VOCAB], product=out)
        except (PastkeyError, MemoryError, BrokenProcessPool) as error:
            reason = str(error) or "not enough memory"
            skipped.append(f"Not measured: {parameters(width, layers) / 1e6:.0f} million parameters: {reason}")
        else:
            engines[parameters(width, layers)] = Engine(open_bundle(out), threads=threads)
    return engines, skipped


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
    from pastkey.train.model import Decoder

    torch.manual_seed(0)
    config = configuration(width, layers)
    model = Decoder(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # zero before training
            torch.nn.init.normal_(weight, std=0.5 * weight.shape[1] ** -0.5)
    export(model, out, context_length=config.max_position_embeddings)

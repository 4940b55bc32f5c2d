"""Several streams at the same time: pastkey beside the other engines, each as an application embeds it."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from .chart import COLORS
from .engines import Engine, Prepared, Worker
from .progress import steps
from .results import markdown
from .speed import Ratio
from .store import Store, digest

STREAMS = (1, 2, 4, 8, 16)  # that begin at the same moment
PROMPT, NEW = 120, 64  # tokens of each
ENGINES = (
    Engine(
        "pastkey-streams",
        "pastkey int8",
        "pastkey",
        "int8",
        "a thread for each stream over one model",
        files_of="pastkey-int8",
        worker="pastkey_streams",
    ),
    Engine(
        "pastkey-step-streams",
        "pastkey int8, without prompt lookup",
        "pastkey",
        "int8",
        "the same with prompt_lookup=False",
        files_of="pastkey-int8",
        worker="pastkey_step_streams",
    ),
    Engine(
        "genai-streams",
        "onnxruntime-genai int8, a Generator each",
        "genai",
        "int8",
        "a Generator for each stream over one Model, in a thread each; a step holds Python's lock, so that they take "
        "turns",
        files_of="genai-int8",
        worker="genai_streams",
    ),
    Engine(
        "genai-batch",
        "onnxruntime-genai int8, one batch",
        "genai",
        "int8",
        "one Generator for all: they begin and end together, and nobody joins",
        files_of="genai-int8",
        worker="genai_batch",
    ),
    Engine(
        "llama-streams",
        "llama-cpp-python Q8_0",
        "llama",
        "Q8_0",
        "one Llama and a lock: it holds one text, so that streams wait for one another. (llama.cpp itself decodes "
        "several sequences in one batch; of llama-cpp-python's classes none does)",
        files_of="llama-q8_0",
        worker="llama_streams",
    ),
)


@dataclass(frozen=True)
class Served:
    """One engine that served so many streams once."""

    first: tuple[float, ...]  # seconds to the first token of each
    last: tuple[float, ...]  # seconds to the last token of each
    tokens: int  # of each

    @property
    def throughput(self) -> float:
        """Tokens per second of all, prompts and waiting included."""
        return self.tokens * len(self.last) / max(self.last)

    @property
    def decode(self) -> float:
        """Tokens per second that one gets after its first token, the median of all."""
        pairs = zip(self.first, self.last, strict=True)
        return statistics.median((self.tokens - 1) / (last - first) for first, last in pairs)


Round = dict[str, dict[int, Served]]  # engine -> streams -> what came of them


@dataclass(frozen=True)
class Figures:
    """One engine at one number of streams: medians over the rounds."""

    throughput: float
    decode: float
    first: float  # seconds to the first token: the median stream's
    worst: float  # and that of the one that waits longest
    ratio: Ratio  # of the reference engine's throughput over its own


def race(
    prepared: Sequence[Prepared],
    prompts: Sequence[Sequence[int]],
    counts: Sequence[int],
    rounds: int,
    threads: int,
    store: Store,
    new_tokens: int,
) -> tuple[list[Round], float]:
    """Every engine serves every number of streams once a round, in an order that rotates. All stay loaded meanwhile.

    `prompts` are taken in turn, other ones in each round. Returns the rounds, and the machine's load average, the
    median of those after each step.
    """
    most = max(counts)
    key = {
        "engines": [one.identity for one in prepared],
        "prompts": digest([*map(list, prompts)]),
        "new": new_tokens,
        "threads": threads,
    }
    warm: set[str] = set()
    found: list[Round] = []
    loads: list[float] = []
    with ExitStack() as stack:
        context = max(map(len, prompts)) + new_tokens
        workers = [
            stack.enter_context(Worker(one, threads=threads, context=context, logs=store.logs)) for one in prepared
        ]

        def serve(number: int, count: int) -> dict[str, Any]:
            taken = {}
            for worker in (*workers[number % len(workers) :], *workers[: number % len(workers)]):
                if worker.engine.name not in warm:
                    worker.ask("streams", prompts=[*prompts[:2]], new_tokens=2)
                    warm.add(worker.engine.name)
                chosen = [prompts[(number * most + place) % len(prompts)] for place in range(count)]
                taken[worker.engine.name] = _asked(worker, chosen, new_tokens)
            return {"served": taken, "load": os.getloadavg()[0]}

        for number in steps(range(rounds), "streams, rounds"):
            one_round: Round = {worker.engine.name: {} for worker in workers}
            for count in counts:
                name, place = f"streams-{digest(key)}-{count}-{number}", {"streams": count, "round": number}
                taken = store.once(name, key | place, partial(serve, number, count))
                loads.append(taken["load"])
                for engine, times in taken["served"].items():
                    one_round[engine][count] = Served(tuple(times[0]), tuple(times[1]), new_tokens)
            found.append(one_round)
    return found, statistics.median(loads)


def _asked(worker: Worker, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[float]]:
    reply = worker.ask("streams", prompts=prompts, new_tokens=new_tokens)
    assert all(len(ids) == new_tokens for ids in reply["ids"])
    return [reply["first_seconds"], reply["last_seconds"]]


def measure_memory(
    prepared: Sequence[Prepared],
    prompts: Sequence[Sequence[int]],
    counts: Sequence[int],
    threads: int,
    store: Store,
    new_tokens: int,
) -> dict[str, dict[int, int]]:
    """engine -> streams -> the most bytes that a fresh process held, which serves these numbers in ascending order."""

    def peaks(one: Prepared) -> list[int]:
        context = max(map(len, prompts)) + new_tokens
        with Worker(one, threads=threads, context=context, logs=store.logs) as worker:
            found = []
            for count in counts:
                _asked(worker, prompts[:count], new_tokens)
                found.append(int(worker.ask("memory")["peak_rss_bytes"]))
            return found

    result = {}
    for one in steps(prepared, "memory of streams, engines"):
        key = {
            "engine": one.identity,
            "prompts": digest([*map(list, prompts[: max(counts)])]),
            "counts": [*counts],
            "new": new_tokens,
            "threads": threads,
        }
        taken = store.once(f"streams-memory-{one.engine.name}", key, partial(peaks, one))
        result[one.engine.name] = dict(zip(counts, taken, strict=True))
    return result


def figures(rounds: Sequence[Round], engine: str, reference: str, count: int) -> Figures:
    """Medians, and the ratio to the reference engine, taken round by round."""
    served = [one[engine][count] for one in rounds]
    ratios = [one[reference][count].throughput / one[engine][count].throughput for one in rounds]
    return Figures(
        throughput=statistics.median(s.throughput for s in served),
        decode=statistics.median(s.decode for s in served),
        first=statistics.median(statistics.median(s.first) for s in served),
        worst=statistics.median(max(s.first) for s in served),
        ratio=Ratio(statistics.median(ratios), min(ratios), max(ratios)),
    )


Table = Mapping[str, Mapping[int, Figures]]  # an engine's title -> streams -> its figures


def tables(found: Table, peaks: Mapping[str, Mapping[int, int]]) -> str:
    """A table of each kind of figure: a line for each engine, a column for each number of streams."""
    counts = list(next(iter(found.values())))
    head, reference = ["streams", *map(str, counts)], next(iter(found))
    others = {title: row for title, row in found.items() if title != reference}

    def of(cell: Callable[[Figures], str], rows: Table) -> str:
        return markdown([head, *([title, *map(cell, row.values())] for title, row in rows.items())])

    parts = [
        "Tokens per second of all streams together, prompts included; in brackets those that one stream gets after its "
        "first token:\n",
        of(lambda f: f"{f.throughput:.3g} ({f.decode:.3g})", found),
        "Seconds to the first token: the median stream's, and the longest:\n",
        of(lambda f: f"{f.first:.2g}, {f.worst:.2g}", found),
        "Most resident memory of a fresh process, in MiB:\n",
        markdown([head, *([title, *(f"{n / 2**20:.0f}" for n in row.values())] for title, row in peaks.items())]),
    ]
    if others:
        ratio = of(lambda f: f"{f.ratio.median:.2f} ({f.ratio.low:.2f} to {f.ratio.high:.2f})", others)
        parts[2:2] = [
            f"How many times that of each {reference} reaches, in the same round (median and range):\n",
            ratio,
        ]
    return "\n".join(parts)


def draw(found: Table, runtimes: Mapping[str, str], file: Path) -> None:
    """Tokens per second and the longest wait for a first token, by streams. `runtimes`: title -> key of COLORS."""
    figure = Figure(figsize=(10, 4.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    seen: dict[str, int] = {}
    for title, row in found.items():
        second = seen.setdefault(runtimes[title], 0)  # of one runtime
        seen[runtimes[title]] += 1
        style = {"color": COLORS[runtimes[title]], "linestyle": ("-", "--")[second], "marker": ("o", "s")[second]}
        left.plot([*row], [f.throughput for f in row.values()], label=title, markersize=4, **style)
        right.plot([*row], [f.worst for f in row.values()], markersize=4, **style)
    counts = list(next(iter(found.values())))
    _finish(left, counts, "tokens per second, all streams together")
    _finish(right, counts, "seconds until the last stream has its first token")
    left.set_ylim(0)
    right.set_yscale("log")
    right.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    right.yaxis.set_minor_formatter(lambda *_: "")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False, handlelength=3.5)
    FigureCanvasAgg(figure).print_png(str(file))


def _finish(axes: Axes, counts: Sequence[int], title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([*counts]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel("streams at the same time")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)

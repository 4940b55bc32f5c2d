"""How fast each engine prefills, decodes and loads, and what memory it takes: interleaved, so that noise is shared."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from .engines import Prepared, Worker
from .progress import steps
from .quality import WINDOW, Text
from .store import Store, digest


@dataclass(frozen=True)
class Shape:
    """One run: a prompt, and greedy tokens after it."""

    prompt: int  # tokens
    new: int  # tokens

    @property
    def length(self) -> int:
        return self.prompt + self.new


SHORT, LONG = Shape(512, 128), Shape(2000, 64)
STRIDE = math.ceil(LONG.prompt / WINDOW)  # windows from one round's prompts to the next round's
FIRST = Shape(37, 0)  # what is loaded for
LOADS = 5  # fresh processes of each engine


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one run."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Ratio:
    """The median of ratios that were taken round by round, and their range."""

    median: float
    low: float
    high: float


Round = dict[str, dict[int, Speed]]  # engine -> prompt tokens -> speed


def race(
    workers: Sequence[Worker],
    prepared: Sequence[Prepared],
    text: Text,
    shapes: Sequence[Shape],
    rounds: int,
    threads: int,
    store: Store,
) -> list[Round]:
    """Every engine runs every shape once a round, in an order that rotates. All stay loaded meanwhile.

    Each round's prompts begin at another of `places` of the text: how far an engine that looks ahead guesses right
    differs from one to the other.
    """
    key = {
        "engines": [one.identity for one in prepared],
        "text": digest([text.windows, [[shape.prompt, shape.new] for shape in shapes]]),
        "threads": threads,
    }
    warm: list[bool] = []

    def one_round(number: int) -> dict[str, dict[int, list[float]]]:
        prompts = {shape: text.prompt(shape.prompt, first=number * STRIDE) for shape in shapes}
        if not warm:
            for worker in workers:
                for ids in prompts.values():
                    worker.ask("generate", ids=ids, new_tokens=2)
            warm.append(True)
        turn = number % len(workers)
        taken: dict[str, dict[int, list[float]]] = {worker.engine.name: {} for worker in workers}
        for shape, ids in prompts.items():
            for worker in (*workers[turn:], *workers[:turn]):
                seconds = worker.ask("generate", ids=ids, new_tokens=shape.new)
                times = [seconds["prefill_seconds"], seconds["decode_seconds"]]
                taken[worker.engine.name][shape.prompt] = times
        return taken

    found = []
    for number in steps(range(rounds), "speed, rounds"):
        name = f"round-{digest(key)}-{number}"
        taken = store.once(name, key | {"round": number}, partial(one_round, number))
        found.append(
            {
                engine: {shape.prompt: _speed(shape, *times[str(shape.prompt)]) for shape in shapes}
                for engine, times in taken.items()
            }
        )
    return found


def places(text: Text, rounds: int) -> int:
    """At how many places of the text the prompts of so many rounds begin."""
    return len({number * STRIDE % len(text.windows) for number in range(rounds)})


def _speed(shape: Shape, prefill_seconds: float, decode_seconds: float) -> Speed:
    return Speed(shape.prompt / prefill_seconds, shape.new / decode_seconds)


def median_speed(rounds: Sequence[Round], engine: str, prompt: int) -> Speed:
    """Of one engine over all rounds."""
    speeds = [one[engine][prompt] for one in rounds]
    return Speed(statistics.median(s.prefill for s in speeds), statistics.median(s.decode for s in speeds))


def ratio(rounds: Sequence[Round], engine: str, rivals: Sequence[str], prompt: int, phase: str) -> Ratio:
    """An engine's speed over that of the fastest rival in the same round; `phase` is "prefill" or "decode"."""
    ratios = [
        getattr(one[engine][prompt], phase) / max(getattr(one[rival][prompt], phase) for rival in rivals)
        for one in rounds
    ]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


# --- fresh processes ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Load:
    """Seconds to the first token of a short prompt, medians over fresh processes; the files are in the page cache."""

    process: float  # from the start of the process
    model: float  # from the end of its imports


def measure_loads(
    prepared: Sequence[Prepared], text: Text, context: int, threads: int, store: Store
) -> Mapping[str, Load]:
    """engine -> its load, from LOADS interleaved repetitions."""
    ids = text.prompt(FIRST.prompt)
    taken: dict[str, list[list[float]]] = {one.engine.name: [] for one in prepared}

    def load(one: Prepared) -> list[float]:
        with Worker(one, threads=threads, context=context, logs=store.logs) as worker:
            worker.start()
            prefill = worker.ask("generate", ids=ids, new_tokens=FIRST.new)["prefill_seconds"]
            return [time.perf_counter() - worker.spawned, worker.load_seconds + prefill]

    for number in steps(range(LOADS), "load, repetitions"):
        for one in (*prepared[number % len(prepared) :], *prepared[: number % len(prepared)]):
            key = {"engine": one.identity, "ids": digest(ids), "threads": threads, "context": context}
            name = f"load-{one.engine.name}-{number}"
            taken[one.engine.name].append(store.once(name, key, partial(load, one)))
    return {
        engine: Load(*(statistics.median(column) for column in zip(*times, strict=True)))
        for engine, times in taken.items()
    }


def measure_memory(prepared: Sequence[Prepared], text: Text, threads: int, store: Store) -> dict[str, int]:
    """engine -> the most bytes that a fresh process held at once over one short run."""
    ids = text.prompt(SHORT.prompt)

    def peak(one: Prepared) -> int:
        with Worker(one, threads=threads, context=SHORT.length, logs=store.logs) as worker:
            worker.ask("generate", ids=ids, new_tokens=SHORT.new)
            return int(worker.ask("memory")["peak_rss_bytes"])

    found = {}
    for one in steps(prepared, "memory, engines"):
        key = {"engine": one.identity, "ids": digest(ids), "new": SHORT.new, "threads": threads}
        found[one.engine.name] = store.once(f"memory-{one.engine.name}", key, partial(peak, one))
    return found

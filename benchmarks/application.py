"""What an application feels beside a model that generates: its event loop, its own work, and a second model.

    python -m benchmarks.application BUNDLE [--threads 2] [--ticks 3000] [--rounds 5]

- ticks: an event loop sleeps 2 ms again and again while streams of `astream` run. Told is the share of ticks that come
  at most 5 ms later than 99 % of an idle loop's.
- work: a thread that hashes, without Python's lock, beside one generation; with onnxruntime's threads that stop when a
  run ends, as pastkey sets it, and that spin on. Told is how much longer a token takes, and how much of its own speed
  the thread keeps.
- turns: two models that generate one token each in turn, against one alone; stopped and spinning.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np

from pastkey.command import Parser, positive_int
from pastkey.runtime import LanguageModel, load
from pastkey.runtime.providers.ort import onnxruntime
from pastkey.runtime.settings import SessionOptions

from .peers.progress import exit_status

TICK, LATE = 0.002, 0.005  # seconds
STREAMS = (1, 4, 8)
TOKENS = 64
SETTINGS: SessionOptions = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "prompt_lookup": False}
BLOCK = bytes(1 << 20)  # what is hashed at once
WAYS = {"stop": {}, "spin": {"session.force_spinning_stop": "0"}}


def prompt(model: LanguageModel, number: int) -> list[int]:
    """Ids that no other number has."""
    found: list[int] = np.random.default_rng(number).integers(0, model.manifest.vocab_size, 32).tolist()
    return found


def generate(model: LanguageModel, number: int = 0) -> float:
    """Seconds of decoding per token."""
    done = model.generate(prompt(model, number), **SETTINGS)
    return done.decode_seconds / max(1, done.new_tokens - 1)


async def _ticks(count: int) -> list[float]:
    """How much later than asked each tick came, in seconds."""
    late = []
    for _ in range(count):
        started = time.perf_counter()
        await asyncio.sleep(TICK)
        late.append(time.perf_counter() - started - TICK)
    return late


async def _ticks_beside(model: LanguageModel, streams: int, count: int) -> list[float]:
    async def keep_on(number: int) -> None:
        while True:
            async for _ in model.astream(prompt(model, number), **SETTINGS):
                pass

    tasks = [asyncio.create_task(keep_on(number)) for number in range(streams)]
    try:
        return await _ticks(count)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def measure_ticks(model: LanguageModel, count: int) -> None:
    """Prints the share of ticks in time."""
    idle = float(np.quantile(asyncio.run(_ticks(count)), 0.99))
    for streams in STREAMS:
        late = np.array(asyncio.run(_ticks_beside(model, streams, count)))
        share, worst = float(np.mean(late <= idle + LATE)), late.max() * 1000
        print(f"ticks, {streams} streams: {share:.2%} of {count} in time, the latest {worst:.1f} ms late", flush=True)


class _Hashing:
    """Hashes in a thread; `speed` is in blocks per second."""

    def __enter__(self) -> _Hashing:
        self._ended, self._blocks, self._started = threading.Event(), 0, time.perf_counter()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._ended.is_set():
            hashlib.sha256(BLOCK)
            self._blocks += 1

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self.speed = self._blocks / (time.perf_counter() - self._started)


def measure_work(models: dict[str, LanguageModel], rounds: int) -> None:
    """Prints what a generation and a hashing thread take from each other."""
    slower: dict[str, list[float]] = {way: [] for way in models}
    kept: dict[str, list[float]] = {way: [] for way in models}
    for _ in range(rounds):
        with _Hashing() as alone:
            time.sleep(1)
        for way, model in models.items():
            seconds = generate(model)
            with _Hashing() as beside:
                slower[way].append(generate(model) / seconds)
            kept[way].append(beside.speed / alone.speed)
    for way in models:
        print(f"work, {way}: a token takes {_told(slower[way])}, the thread keeps {_told(kept[way])}", flush=True)


def measure_turns(models: Mapping[str, Sequence[LanguageModel]], rounds: int) -> None:
    """Prints how long a token takes where two models take turns, against one alone."""
    found: dict[str, list[float]] = {way: [] for way in models}
    for _ in range(rounds):
        for way, (one, other) in models.items():
            alone = generate(one)
            streams = [model.stream(prompt(model, 1), **SETTINGS) for model in (one, other)]
            for stream in streams:
                next(stream)  # the prompt
            started, steps = time.perf_counter(), 0
            for _pair in zip(*streams, strict=True):
                steps += 2
            found[way].append((time.perf_counter() - started) / steps / alone)
    for way in models:
        print(f"turns, {way}: a token takes {_told(found[way])} of one alone", flush=True)


def _told(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="benchmarks.application", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=positive_int, default=2)
    parser.add_argument("--ticks", type=positive_int, default=3000)
    parser.add_argument("--rounds", type=positive_int, default=5)
    arguments = parser.parse_args(argv)

    def opened(way: str) -> LanguageModel:
        return load(arguments.bundle, threads=arguments.threads, session_options=WAYS[way])

    def measure() -> None:
        print(f"onnxruntime {onnxruntime.__version__}, {arguments.threads} threads, {os.cpu_count()} processors")
        models = {way: [opened(way), opened(way)] for way in WAYS}
        measure_ticks(models["stop"][0], arguments.ticks)
        measure_work({way: pair[0] for way, pair in models.items()}, arguments.rounds)
        measure_turns(models, arguments.rounds)

    return exit_status("benchmarks.application", measure)


if __name__ == "__main__":
    raise SystemExit(main())

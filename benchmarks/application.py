"""The effect of a generating model on an application: its event loop, its own work, and a second model.

- ticks: an event loop sleeps 2 ms again and again while streams of `astream` run. Measured is the share of ticks that
  come at most 5 ms later than 99 % of an idle loop's.
- work: a thread that hashes, without Python's lock, during one generation; with onnxruntime's threads that stop when a
  run ends, as pastkey sets it, and that spin on.
- turns: two models that generate one token each in turn, against a single one; stopped and spinning.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np

from pastkey.runtime import LanguageModel, load
from pastkey.runtime.settings import SessionOptions

from .measure import Answer, Spread, Table, facts_of, interleaved

TICK, LATE = 0.002, 0.005  # seconds
STREAMS = (1, 4, 8)
BLOCK = bytes(1 << 20)  # what is hashed at once
WAYS = {"stop": {}, "spin": {"session.force_spinning_stop": "0"}}


def application(bundle: Path, *, threads: int = 2, ticks: int = 3000, rounds: int = 5, new_tokens: int = 64) -> Answer:
    """Arms: threads of onnxruntime that stop and that spin. Metric: ticks in time; time of a token over one model's."""
    options: SessionOptions = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "prompt_lookup": False,
    }
    models = {
        way: [load(bundle, threads=threads, session_options=session) for _ in range(2)] for way, session in WAYS.items()
    }
    quiet = models["stop"][0]
    idle, rows = float(np.quantile(asyncio.run(_ticks(ticks)), 0.99)), []
    for streams in STREAMS:
        late = np.array(asyncio.run(_ticks_beside(quiet, options, streams, ticks)))
        rows.append([f"{streams}", f"{np.mean(late <= idle + LATE):.2%}", f"{late.max() * 1000:.1f}"])
    yield Table(f"Of {ticks} ticks of 2 ms:", ["streams", "in time", "the latest (ms late)"], rows)

    arms = {
        f"{what}, {way}": partial(measured, pair, options)
        for way, pair in models.items()
        for what, measured in (("work", _work), ("turns", _turns))
    }
    measured = interleaved(arms, rounds, "application", warm=False)
    rows = []
    for way in WAYS:
        slower, speed = zip(*(one[f"work, {way}"] for one in measured), strict=True)
        turns = Spread.of(one[f"turns, {way}"][0] for one in measured)
        rows.append([way, f"{Spread.of(slower)}", f"{Spread.of(speed)}", f"{turns}"])
    columns = ["threads", "beside a thread that hashes", "speed that this thread keeps", "two models in turn"]
    yield Table("Time of a token over that of one model alone:", columns, rows)
    yield facts_of(quiet.bundle, threads)


def _prompt(model: LanguageModel, number: int) -> list[int]:
    """Ids that no other number has."""
    found: list[int] = np.random.default_rng(number).integers(0, model.manifest.vocab_size, 32).tolist()
    return found


def _token(model: LanguageModel, options: SessionOptions) -> float:
    """Seconds of decoding per token."""
    done = model.generate(_prompt(model, 0), **options)
    return done.decode_seconds / max(1, done.new_tokens - 1)


async def _ticks(count: int) -> list[float]:
    """How much later than asked each tick came, in seconds."""
    late = []
    for _ in range(count):
        started = time.perf_counter()
        await asyncio.sleep(TICK)
        late.append(time.perf_counter() - started - TICK)
    return late


async def _ticks_beside(model: LanguageModel, options: SessionOptions, streams: int, count: int) -> list[float]:
    async def generate(number: int) -> None:
        while True:
            async for _ in model.astream(_prompt(model, number), **options):
                pass

    tasks = [asyncio.create_task(generate(number)) for number in range(streams)]
    try:
        return await _ticks(count)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


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


def _work(models: list[LanguageModel], options: SessionOptions, _: int) -> tuple[float, ...]:
    """The slowdown of a token while another thread hashes, and the share of its speed that the thread keeps."""
    with _Hashing() as alone:
        time.sleep(0.5)
    token = _token(models[0], options)
    with _Hashing() as beside:
        slower = _token(models[0], options) / token
    return slower, beside.speed / alone.speed


def _turns(models: list[LanguageModel], options: SessionOptions, _: int) -> tuple[float, ...]:
    """The time of a token where two models run in turn, over that of a single one."""
    alone = _token(models[0], options)
    streams = [model.stream(_prompt(model, 1), **options) for model in models]
    for stream in streams:
        next(stream)  # the prompt
    started, steps = time.perf_counter(), 0
    for _pair in zip(*streams, strict=True):
        steps += 2
    return ((time.perf_counter() - started) / steps / alone,)

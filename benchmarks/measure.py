"""Shared by all questions: interleaved rounds, paired ratios with their range, tables, and facts of the machine.

Slim imports: a process whose memory is measured imports this.
"""

from __future__ import annotations

import datetime
import hashlib
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

import pastkey
from pastkey.command import say
from pastkey.contract.bundle import Bundle
from pastkey.runtime.providers.ort import onnxruntime

from .peers.workers.protocol import peak_rss_bytes

ROOT = Path(__file__).parent.parent
WORK = ROOT / "benchmarks" / ".work"
MIB = 2**20
NOT_TOLD = "not told"  # the figure of an engine that does not tell what it is of
_CPU_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")

TextFile = Path  # of a flag: UTF-8, and there
Item = TypeVar("Item")
Result = TypeVar("Result")
Once = Callable[[str, Callable[[], Any]], Any]  # Store.once with its key: a finished step is not done again


class BenchmarkError(Exception):
    """An engine, a conversion or an installation that failed: a sentence that names its log."""


# --- rounds -------------------------------------------------------------------------------------------------------
class Spread(NamedTuple):
    """The median of the rounds, and their range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of one value for each round."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))

    def __format__(self, form: str) -> str:
        form = form or ".2f"
        return f"{self.median:{form}} ({self.low:{form}} to {self.high:{form}})"


def always(_: str, make: Callable[[], Any]) -> Any:
    """A `Once` that stores nothing."""
    return make()


def interleaved(
    arms: Mapping[str, Callable[[int], Result]], rounds: int, what: str, *, warm: bool = True, once: Once = always
) -> list[dict[str, Result]]:
    """The return values of each arm in each round, in an order that rotates, so that a noisy machine affects all alike.

    Each arm is called with the number of the round. `warm` calls every arm once before.
    """
    names, warmed = list(arms), not warm

    def one_round(number: int) -> dict[str, Result]:
        nonlocal warmed
        if not warmed:
            for arm in arms.values():
                arm(0)
            warmed = True
        turn = number % len(names)
        return {name: arms[name](number) for name in (*names[turn:], *names[:turn])}

    return [once(f"{what}-{n}", partial(one_round, n)) for n in steps(range(rounds), f"{what}, rounds")]


def paired(rounds: Sequence[Mapping[str, float]], above: str, below: str) -> Spread:
    """The ratio of two arms within each round."""
    return Spread.of(one[above] / one[below] for one in rounds)


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """The time of a call by this clock."""
    started = clock()
    work()
    return clock() - started


def steps(items: Sequence[Item], description: str) -> Iterator[Item]:
    """The items, one after another, with a sign of life for each: a bar on a terminal, lines elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=description, dynamic_ncols=True)
        return
    for number, item in enumerate(items, 1):
        say(f"{description}: {number} of {len(items)}")
        yield item


def fresh(work: Callable[..., Result], *arguments: Any) -> Result:
    """The return value of `work` in a fresh Python, which imports only its module and ends with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def fresh_peak(work: Callable[..., object], *arguments: Any) -> int:
    """The most bytes that a fresh Python holds which calls `work`. Linux only."""
    return fresh(_peak_of, work, arguments)


def _peak_of(work: Callable[..., object], arguments: tuple[Any, ...]) -> int:
    work(*arguments)
    return peak_rss_bytes()


# --- tables -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Table:
    """Figures with the sentence that says what they are."""

    sentence: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        return f"{self.sentence}\n\n{markdown([self.columns, *self.rows])}".lstrip()


Answer = Iterator[Table | str]  # tables, and sentences between them


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first line is its head."""
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body])


def rows_of(page: str, first_column: str, number: int = 0) -> list[dict[str, str]]:
    """The rows of a page's table of this number among those with this first column, each by the columns' names."""
    begin = f"| {first_column} |"
    lines = (begin + page.split(f"\n{begin}")[1 + number]).split("\n\n")[0].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def named(settings: Mapping[str, Any]) -> str:
    """Settings of a call, for a reader."""
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "greedy"


# --- facts --------------------------------------------------------------------------------------------------------
def facts_of(bundle: Bundle, threads: int | None = None) -> str:
    """The facts of the measurement, for the end of an answer."""
    manifest = bundle.manifest
    cache = "shared cache buffer" if manifest.graph == "fused" else f"{manifest.graph} graph"
    level = "" if manifest.precision.startswith("fp") else ", accuracy level 4"
    count = "" if threads is None else f", {threads} thread{'s' * (threads > 1)}"
    return f"{manifest.source}: {manifest.precision}{level}, context {manifest.context_length}, {cache}, CPU{count}"


def machine() -> list[str]:
    """Processor, memory, load and system, as far as Linux says."""
    model, flags, memory = platform.processor() or platform.machine(), set[str](), ""
    for line in _lines("/proc/cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
        if name.strip() in ("flags", "Features"):
            flags = set(value.split())
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal:"):
            memory = f", {int(line.split()[1]) / 2**20:.0f} GiB of memory"
    known = ", ".join(flag for flag in _CPU_FLAGS if flag in flags)
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    busy = "; other programs ran meanwhile: only ratios count" if load > 2 * cores + 2 else ""
    return [
        f"{model}, {cores} cores{memory}" + (f"; {known}" if known else ""),
        f"load average {load:.1f}{busy}",
        f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}",
        f"pastkey {own_version()}, onnxruntime {onnxruntime.__version__}, numpy {np.__version__}",
        f"measured on {datetime.date.today():%d %B %Y}",
    ]


def own_version() -> str:
    """pastkey's version and a digest of its source, which a version number does not tell apart."""
    content = hashlib.sha256()
    for folder in ("pastkey", "train", "export", "runtime", "kernels"):
        sources = [file for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".cc", ".inl", ".h")]
        for file in sorted(sources):
            content.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return f"{pastkey.__version__} (source {content.hexdigest()[:8]})"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []

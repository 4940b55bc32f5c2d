"""pastkey beside other engines on the same weights: quality, speed, load and memory.

Every engine has a process of its own. All run once in each round, on prompts that begin at another place of the text in
each: how far an engine that looks ahead guesses right differs from one place to the other.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.measure import MIB, WORK, Answer, Once, Spread, Table, TextFile, interleaved, steps
from benchmarks.store import Store, digest
from benchmarks.texts import QUESTIONS, WINDOW, Text, open_text, question_ids
from pastkey.contract.bundle import open_bundle
from pastkey.errors import InputError
from pastkey.export.measure.metrics import Sums, agreeing_tokens

from .convert import chosen, described, open_source, prepare, prepare_all
from .engines import ENGINES, REFERENCE, Prepared, Worker


class Shape(NamedTuple):
    """One run: a prompt, and greedy tokens after it."""

    prompt: int  # tokens
    new: int  # tokens


SHAPES = (Shape(512, 128), Shape(2000, 64))  # memory is of the first one
STRIDE = math.ceil(SHAPES[-1].prompt / WINDOW)  # windows from one round's prompts to the next round's
ANSWER = 24  # tokens
FIRST = 37  # tokens of the prompt that is loaded for
LOADS = 5  # fresh processes of each engine
EXACT = 1e-6  # nats: below it, differences are those of float32 itself
PHASES = ("prefill", "decode")


def peers(
    *,
    full: bool = False,
    rounds: int = 11,
    threads: int = 2,
    model: Path | None = None,
    text: TextFile | None = None,
    only: Sequence[str] | None = None,
    work: Path = WORK,
) -> Answer:
    """Arms: a process per engine. Metric: speed over the fastest int8 peer, KL divergence, load, peak memory."""
    engines, windows = chosen(ENGINES, only, full, REFERENCE), 24 if full else 6
    source, store = open_source(model), Store(work)
    prepared, skipped = prepare_all(engines, lambda engine: prepare(engine, source, store))
    bundle = open_bundle(prepared[0].model)
    passages = open_text(
        text,
        bundle,
        threads,
        partial(store.once, key=[prepared[0].identity, windows]),
        own=windows,
        most=max(windows, STRIDE * rounds),
    )
    longest = min(passages.tokens, bundle.manifest.context_length - SHAPES[-1].new)
    shapes = [shape for shape in SHAPES if shape.prompt <= longest]
    if not shapes:
        raise InputError(
            f"{source.name} has a context of {bundle.manifest.context_length} tokens and the text {passages.tokens}; "
            f"{sum(SHAPES[0])} are needed"
        )
    once = partial(store.once, key=[[one.identity for one in prepared], digest(passages.windows), threads])
    context = max(map(sum, shapes))
    with contextlib.ExitStack() as stack:
        workers = {
            one.engine.name: stack.enter_context(Worker(one, threads=threads, context=context, logs=store.logs))
            for one in prepared
        }
        errors = measure_windows(workers, passages.windows[:windows], once, store)
        answers = measure_answers(workers, question_ids(bundle), once)
        raced = {shape: race(workers, shape, passages, rounds, once) for shape in shapes}
    loads = measure_loads(prepared, passages.prompt(FIRST), context, threads, store, once)
    peaks = {
        one.engine.name: once(
            f"memory-{one.engine.name}", partial(_peak, one, passages.prompt(SHAPES[0].prompt), threads, store)
        )
        for one in steps(prepared, "memory, engines")
    }

    ordered = sorted(prepared, key=lambda one: ENGINES.index(one.engine))
    rows = []
    for one in ordered:
        name = one.engine.name
        expected = answers[REFERENCE.name]
        quality = summary([window[name] for window in errors], answers[name], expected, bundle.manifest.eos_token_ids)
        speeds = [
            f"{statistics.median(found[name][phase] for found in raced[shape]):{form}}"
            for phase, form in (("prefill", ".0f"), ("decode", ".1f"))
            for shape in shapes
        ]
        process, loaded = (statistics.median(round_[name][part] for round_ in loads) for part in (0, 1))
        load = f"{process:.2f} ({loaded:.2f})"
        rows.append([one.engine.title, f"{one.size / 1e6:.0f}", *quality, *speeds, f"{peaks[name] / MIB:.0f}", load])
    columns = ["engine", "MB", "KL divergence (nats)", "top-1", "perplexity", "answers equal (tokens)"]
    columns += [f"{phase} {shape.prompt} (tok/s)" for phase in PHASES for shape in shapes]
    yield Table(
        f"{source.name}, the same weights for every engine; --threads {threads}, {rounds} interleaved rounds:",
        [*columns, "peak (MiB)", "first token (s)"],
        rows,
    )
    places = len({number * STRIDE % len(passages.windows) for number in range(rounds)})
    decode = ", and ".join(f"of {shape.new} tokens after {shape.prompt}" for shape in shapes)
    yield (
        f"MB: all files of the model, in 10⁶ bytes. KL divergence from float32, top-1 agreement with it, and "
        f"perplexity: means over {windows} times {WINDOW} tokens of {passages.name}. Answers: the share of "
        f"{len(QUESTIONS)} short questions whose greedy answer (up to {ANSWER} tokens) equals float32's to its end, "
        f"and the share of those tokens that come before the first difference. Speeds: medians; prompts begin at "
        f"{places} places of that text; decode {decode}. Peak: resident memory of a fresh process over "
        f"{SHAPES[0].prompt} + {SHAPES[0].new} tokens. First token: of a prompt of {FIRST} tokens, from the start of a "
        f"fresh process, and in brackets from the end of its imports; medians of {LOADS} processes, files in the page "
        "cache."
    )
    rivals = [one.engine for one in ordered if one.engine.rival]
    if rivals:
        ratios = [
            [one.engine.title]
            + [
                f"{over_fastest(raced[s], one.engine.name, [r.name for r in rivals], p)}"
                for p in PHASES
                for s in shapes
            ]
            for one in ordered
        ]
        names = " and ".join(engine.title for engine in rivals)
        yield Table(
            f"Speed over the fastest of {names} in the same round, median and range:",
            ["engine", *(f"{phase} {shape.prompt}" for phase in PHASES for shape in shapes)],
            ratios,
        )
    yield from skipped
    yield described(ordered, threads)


# --- quality ------------------------------------------------------------------------------------------------------
def measure_windows(
    workers: Mapping[str, Worker], windows: Sequence[Sequence[int]], once: Once, store: Store
) -> list[dict[str, dict[str, float]]]:
    """The figures of each engine on each window. The first worker is the reference."""
    file = store.folder / "logits.npy"

    def logits(worker: Worker, ids: Sequence[int]) -> np.ndarray:
        """(T, V) float32."""
        worker.ask("logits", ids=list(ids), out=str(file))
        found: np.ndarray = np.load(file)
        file.unlink()
        return found

    def measure(ids: Sequence[int]) -> dict[str, dict[str, float]]:
        reference, *others = workers
        expected = logits(workers[reference], ids)
        own = {reference: compare(expected, expected, ids)}
        return own | {name: compare(expected, logits(workers[name], ids), ids) for name in others}

    return [
        once(f"quality-{number}", partial(measure, windows[number])) for number in steps(range(len(windows)), "windows")
    ]


def compare(reference: np.ndarray, logits: np.ndarray, ids: Sequence[int]) -> dict[str, float]:
    """Means over the positions of one window, for logits (T, V): KL divergence, top-1 agreement, and cross entropy."""
    sums = Sums()
    sums.add(np.array(ids), logits, reference)
    return {
        "kl_divergence": sums.kl / sums.tokens,
        "top1_agreement": sums.same_top / sums.tokens,
        "cross_entropy": sums.loss / sums.predicted,
    }


def measure_answers(
    workers: Mapping[str, Worker], prompts: Sequence[list[int]], once: Once
) -> dict[str, list[list[int]]]:
    """engine -> the greedy continuation of each prompt."""

    def ask(worker: Worker) -> list[list[int]]:
        return [worker.ask("generate", ids=ids, new_tokens=ANSWER)["ids"] for ids in prompts]

    return {
        name: once(f"answers-{name}", partial(ask, workers[name])) for name in steps([*workers], "answers, engines")
    }


def summary(
    windows: Sequence[Mapping[str, float]],
    answers: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    ends: Iterable[int],
) -> list[str]:
    """The cells of KL divergence, top-1 agreement, perplexity and answers.

    What comes after an end token in `expected` does not count.
    """
    ended = frozenset(ends)
    whole = []
    for ids in expected:
        first = next((place for place, token in enumerate(ids) if token in ended), len(ids))
        whole.append(list(ids[: first + 1]))  # the end token is part of an answer
    shared = [agreeing_tokens(answer, right) for answer, right in zip(answers, whole, strict=True)]
    equal = statistics.fmean(n == len(right) for n, right in zip(shared, whole, strict=True))
    kl, top1, loss = (
        statistics.fmean(window[name] for window in windows)
        for name in ("kl_divergence", "top1_agreement", "cross_entropy")
    )
    return [
        "0" if kl < EXACT else f"{kl:.4f}" if 1e-4 <= kl < 1 else f"{kl:.2g}",
        f"{top1:.1%}",
        f"{math.exp(loss):.2f}",
        f"{equal:.0%} ({sum(shared) / sum(map(len, whole)):.0%})",
    ]


# --- speed, load and memory ---------------------------------------------------------------------------------------
Speeds = dict[str, dict[str, float]]  # engine -> phase -> tokens per second


def race(workers: Mapping[str, Worker], shape: Shape, text: Text, rounds: int, once: Once) -> list[Speeds]:
    """Every engine runs the shape once a round. All stay loaded meanwhile."""

    def run(worker: Worker, number: int) -> dict[str, float]:
        ids = text.prompt(shape.prompt, first=number * STRIDE)
        reply = worker.ask("generate", ids=ids, new_tokens=shape.new)
        return {"prefill": shape.prompt / reply["prefill_seconds"], "decode": shape.new / reply["decode_seconds"]}

    arms = {name: partial(run, worker) for name, worker in workers.items()}
    return interleaved(arms, rounds, f"speed {shape.prompt}", once=once)


def over_fastest(rounds: Sequence[Speeds], engine: str, rivals: Sequence[str], phase: str) -> Spread:
    """An engine's speed over that of the fastest rival in the same round."""
    return Spread.of(one[engine][phase] / max(one[rival][phase] for rival in rivals) for one in rounds)


def measure_loads(
    prepared: Sequence[Prepared], ids: list[int], context: int, threads: int, store: Store, once: Once
) -> list[dict[str, list[float]]]:
    """Seconds to the first token of a fresh process, from its start and from the end of its imports."""

    def load(one: Prepared, _: int) -> list[float]:
        with Worker(one, threads=threads, context=context, logs=store.logs) as worker:
            worker.start()
            prefill = worker.ask("generate", ids=ids, new_tokens=0)["prefill_seconds"]
            return [time.perf_counter() - worker.spawned, worker.load_seconds + prefill]

    arms = {one.engine.name: partial(load, one) for one in prepared}
    return interleaved(arms, LOADS, "load", warm=False, once=once)


def _peak(one: Prepared, ids: list[int], threads: int, store: Store) -> int:
    """The most bytes that a fresh process held at once over one short run."""
    with Worker(one, threads=threads, context=sum(SHAPES[0]), logs=store.logs) as worker:
        worker.ask("generate", ids=ids, new_tokens=SHAPES[0].new)
        return int(worker.ask("memory")["peak_rss_bytes"])

"""pastkey and other engines on the same weights: quality, speed, load and memory.

Every engine has a separate process. All run once in each round, on prompts that begin at another place of the text in
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

from benchmarks.measure import MIB, NOT_TOLD, WORK, Answer, Once, Spread, Table, TextFile, interleaved, steps
from benchmarks.store import Store, digest
from benchmarks.texts import QUESTIONS, WINDOW, Text, open_text, question_ids
from pastkey.contract.bundle import open_bundle
from pastkey.errors import InputError
from pastkey.export.measure.metrics import Sums, agreeing_tokens

from .convert import chosen, described, open_source, prepare, prepare_all, with_context
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
AFTER = 32  # tokens behind each of --contexts
EXACT = 1e-6  # nats: below it, differences are those of float32 itself
PHASES = ("prefill", "decode")
QUALITY = ("KL divergence (nats)", "top-1", "perplexity", "answers equal (tokens)")
COSTS = ("peak (MiB)", "first token (s)")


def peers(
    *,
    full: bool = False,
    rounds: int = 11,
    threads: int = 2,
    model: Path | None = None,
    text: TextFile | None = None,
    only: Sequence[str] | None = None,
    contexts: Sequence[int] | None = None,
    work: Path = WORK,
) -> Answer:
    """Arms: a process per engine. Metric: speed over the fastest int8 peer, KL divergence, load, peak memory.

    With --contexts: only speeds, after prompts of these lengths. A GGUF of a shorter context is declared with a
    longer one: its text makes no sense there, and only its speed counts.
    """
    wanted = [Shape(length, AFTER) for length in sorted(set(contexts))] if contexts else SHAPES
    engines, windows = chosen(ENGINES, only, full, ENGINES[0] if contexts else REFERENCE), 24 if full else 6
    source, store = open_source(model), Store(work)
    if contexts:
        engines = [one for one in engines if one != REFERENCE]
        source, store = with_context(source, sum(wanted[-1]), store)
    prepared, skipped = prepare_all(engines, lambda engine: prepare(engine, source, store))
    bundle = open_bundle(prepared[0].model)
    passages = open_text(
        text,
        bundle,
        threads,
        partial(store.once, key=[prepared[0].identity, windows]),
        own=windows,
        most=max(windows, STRIDE * rounds, math.ceil(wanted[-1].prompt / WINDOW)),
    )
    room = min(passages.tokens, bundle.manifest.context_length - wanted[-1].new)
    shapes = [shape for shape in wanted if shape.prompt <= room]
    if not shapes or (contexts and len(shapes) < len(wanted)):
        raise InputError(
            f"{source.name} has a context of {bundle.manifest.context_length} tokens and the text {passages.tokens}; "
            f"{sum(wanted[-1] if contexts else wanted[0])} are needed"
        )
    once = partial(store.once, key=[[one.identity for one in prepared], digest(passages.windows), threads])
    context = max(map(sum, shapes))
    with contextlib.ExitStack() as stack:
        workers = {
            one.engine.name: stack.enter_context(Worker(one, threads=threads, context=context, logs=store.logs))
            for one in prepared
        }
        if not contexts:
            errors = measure_windows(workers, passages.windows[:windows], once, store)
            answers = measure_answers(workers, question_ids(bundle), once)
        raced = {
            shape: race(workers, shape, passages, rounds, once, SHAPES[0] if contexts else shape) for shape in shapes
        }
    quality: dict[str, list[str]] = {}
    costs: dict[str, list[str]] = {}
    if not contexts:
        ends, expected = bundle.manifest.eos_token_ids, answers[REFERENCE.name]
        for name in answers:
            quality[name] = summary([one[name] for one in errors if name in one], answers[name], expected, ends)
        costs = measure_costs(prepared, passages, context, threads, store, once)
    ordered = sorted(prepared, key=lambda one: ENGINES.index(one.engine))
    columns = ["engine", "MB", *(() if contexts else QUALITY)]
    columns += [f"{phase} {shape.prompt} (tok/s)" for phase in PHASES for shape in shapes]
    rows = [
        [
            one.engine.title,
            f"{one.size / 1e6:.0f}",
            *quality.get(one.engine.name, ()),
            *speeds(raced, one.engine.name),
            *costs.get(one.engine.name, ()),
        ]
        for one in ordered
    ]
    yield Table(
        f"{source.name}, the same weights for every engine; --threads {threads}, {rounds} interleaved rounds:",
        [*columns, *(() if contexts else COSTS)],
        rows,
    )
    yield _legend(passages, shapes, rounds, 0 if contexts else windows)
    yield from ratios(ordered, raced)
    yield from skipped
    yield described(ordered, threads)


def _legend(passages: Text, shapes: Sequence[Shape], rounds: int, windows: int) -> str:
    """The columns of the table; without `windows` there are only speeds."""
    places = len({number * STRIDE % len(passages.windows) for number in range(rounds)})
    decode = ", and ".join(f"of {shape.new} tokens after {shape.prompt}" for shape in shapes)
    speed = f"Speeds: medians; prompts begin at {places} places of {{}}; decode {decode}."
    size = "MB: all files of the model, in 10⁶ bytes."
    if not windows:
        return f"{size} {speed.format(passages.name)}"
    return (
        f"{size} KL divergence from float32, top-1 agreement with it, and perplexity: means over {windows} times "
        f"{WINDOW} tokens of {passages.name}. Answers: the share of {len(QUESTIONS)} short questions whose greedy "
        f"answer (up to {ANSWER} tokens) equals float32's to its end, and the share of those tokens that come before "
        f"the first difference. {speed.format('that text')} Peak: resident memory of a fresh process over "
        f"{SHAPES[0].prompt} + {SHAPES[0].new} tokens. First token: of a prompt of {FIRST} tokens, from the start of a "
        f"fresh process, and in brackets from the end of its imports; medians of {LOADS} processes, files in the page "
        "cache."
    )


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
        told = [name for name in others if workers[name].engine.tells_logits]
        return own | {name: compare(expected, logits(workers[name], ids), ids) for name in told}

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
    answered = f"{equal:.0%} ({sum(shared) / sum(map(len, whole)):.0%})"
    if not windows:
        return [NOT_TOLD] * 3 + [answered]
    kl, top1, loss = (
        statistics.fmean(window[name] for window in windows)
        for name in ("kl_divergence", "top1_agreement", "cross_entropy")
    )
    return [
        "0" if kl < EXACT else f"{kl:.4f}" if 1e-4 <= kl < 1 else f"{kl:.2g}",
        f"{top1:.1%}",
        f"{math.exp(loss):.2f}",
        answered,
    ]


# --- speed, load and memory ---------------------------------------------------------------------------------------
Speeds = dict[str, dict[str, float]]  # engine -> phase -> tokens per second


def race(workers: Mapping[str, Worker], shape: Shape, text: Text, rounds: int, once: Once, warm: Shape) -> list[Speeds]:
    """Every engine runs the shape once a round, and `warm` before its first. All stay loaded meanwhile."""
    cold = set(workers)

    def run(name: str, number: int) -> dict[str, float]:
        if name in cold:
            cold.remove(name)
            workers[name].ask("generate", ids=text.prompt(warm.prompt), new_tokens=warm.new)
        ids = text.prompt(shape.prompt, first=number * STRIDE)
        reply = workers[name].ask("generate", ids=ids, new_tokens=shape.new)
        return {"prefill": shape.prompt / reply["prefill_seconds"], "decode": shape.new / reply["decode_seconds"]}

    arms = {name: partial(run, name) for name in workers}
    return interleaved(arms, rounds, f"speed {shape.prompt}", warm=False, once=once)


def speeds(raced: Mapping[Shape, list[Speeds]], engine: str) -> list[str]:
    """An engine's cells, medians: each of PHASES by each of the shapes."""
    return [
        f"{statistics.median(one[engine][phase] for one in rounds):{form}}"
        for phase, form in zip(PHASES, (".0f", ".1f"), strict=True)
        for rounds in raced.values()
    ]


def ratios(ordered: Sequence[Prepared], raced: Mapping[Shape, list[Speeds]]) -> Answer:
    """The table of speeds over the fastest rival's, if there is one."""
    rivals = [one.engine for one in ordered if one.engine.rival]
    rows = []
    for engine in (one.engine for one in ordered):
        others = [one.name for one in rivals if engine.drafts or not one.drafts]
        if others:
            found = [over_fastest(rounds, engine.name, others, phase) for phase in PHASES for rounds in raced.values()]
            rows.append([engine.title, *(f"{one}" for one in found)])
    if rows:
        fair = " (an engine without prompt lookup: of those without it)" * any(one.drafts for one in rivals)
        names = ", ".join(one.title for one in rivals)
        yield Table(
            f"Speed over the fastest of {names} in the same round{fair}, median and range:",
            ["engine", *(f"{phase} {shape.prompt}" for phase in PHASES for shape in raced)],
            rows,
        )


def over_fastest(rounds: Sequence[Speeds], engine: str, rivals: Sequence[str], phase: str) -> Spread:
    """An engine's speed over that of the fastest rival in the same round."""
    return Spread.of(one[engine][phase] / max(one[rival][phase] for rival in rivals) for one in rounds)


def measure_costs(
    prepared: Sequence[Prepared], text: Text, context: int, threads: int, store: Store, once: Once
) -> dict[str, list[str]]:
    """Each engine's cells of COSTS."""
    loads = measure_loads(prepared, text.prompt(FIRST), context, threads, store, once)
    cells = {}
    for one in steps(prepared, "memory, engines"):
        name = one.engine.name
        peak = once(f"memory-{name}", partial(_peak, one, text.prompt(SHAPES[0].prompt), threads, store))
        process, loaded = (statistics.median(round_[name][part] for round_ in loads) for part in (0, 1))
        cells[name] = [f"{peak / MIB:.0f}", f"{process:.2f} ({loaded:.2f})"]
    return cells


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

"""Several streams that begin at the same moment: pastkey and other engines, each as an application embeds it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import MIB, WORK, Answer, Spread, Table, TextFile, interleaved, steps
from benchmarks.store import Store, digest
from benchmarks.texts import codec_of, open_text
from pastkey.contract.bundle import open_bundle

from .convert import chosen, described, of_bundle, open_source, prepare, prepare_all
from .engines import STREAM_ENGINES, Engine, Prepared, Worker

Served = dict[str, float]
Rounds = list[dict[str, Served]]  # engine -> the result of its streams


def streams(
    bundle: Path | None = None,
    *,
    streams: Sequence[int] = (1, 2, 4, 8, 16),
    prompt_tokens: int = 120,
    new_tokens: int = 64,
    rounds: int = 5,
    threads: int = 2,
    text: TextFile | None = None,
    only: Sequence[str] | None = None,
    work: Path = WORK,
) -> Answer:
    """Arms: a process per engine. Metric: tokens per second of all, waits for a first token, peak memory.

    Without a bundle it is the int8 export of SmolLM2-135M-Instruct, whose weights the others get in any case.
    """
    counts, store = sorted(set(streams)), Store(work)

    def make(engine: Engine) -> Prepared:
        if bundle is not None and engine.runtime == "pastkey":
            return of_bundle(engine, bundle)
        return prepare(engine, open_source(None), store)

    ours = STREAM_ENGINES[0]
    prepared, skipped = prepare_all(chosen(STREAM_ENGINES, only, False, ours), make)
    opened = open_bundle(prepared[0].model)
    codec_of(opened)  # streams are of texts
    most = max(counts) * rounds
    text_once = partial(store.once, key=[prepared[0].identity, max(counts)])
    passages = open_text(text, opened, threads, text_once, own=max(counts), most=most)
    prompts = [passages.prompt(prompt_tokens, first=number) for number in range(most)]
    once = partial(store.once, key=[[one.identity for one in prepared], digest(prompts), new_tokens, threads])

    def worker_of(one: Prepared) -> Worker:
        return Worker(one, threads=threads, context=prompt_tokens + new_tokens, logs=store.logs)

    with ExitStack() as stack:
        workers = {one.engine.title: stack.enter_context(worker_of(one)) for one in prepared}

        def serve(worker: Worker, count: int, number: int) -> Served:
            taken = [prompts[(number * max(counts) + place) % most] for place in range(count)]
            return served(worker.ask("streams", prompts=taken, new_tokens=new_tokens))

        measured = {
            count: interleaved(
                {title: partial(serve, worker, count) for title, worker in workers.items()},
                rounds,
                f"streams {count}",
                once=once,
            )
            for count in counts
        }

    def peaks(one: Prepared) -> list[int]:
        """The peak of a fresh process, which serves the numbers of streams in ascending order."""
        found = []
        with worker_of(one) as worker:
            for count in counts:
                worker.ask("streams", prompts=prompts[:count], new_tokens=new_tokens)
                found.append(int(worker.ask("memory")["peak_rss_bytes"]))
        return found

    memory = {
        one.engine.title: once(f"streams-memory-{one.engine.name}", partial(peaks, one))
        for one in steps(prepared, "memory of streams, engines")
    }
    yield (
        f"Each stream has a prompt of {prompt_tokens} tokens of {passages.name} and {new_tokens} greedy tokens; all "
        f"begin at the same moment. Medians of {rounds} interleaved rounds; every engine with --threads {threads}."
    )
    yield from tables(measured, memory, ours.title)
    yield from skipped
    yield described(prepared, threads)


def served(reply: Mapping[str, Any]) -> Served:
    """Tokens per second of all streams, prompts and waiting included; of one after its first token; waits."""
    first, last, tokens = reply["first_seconds"], reply["last_seconds"], len(reply["ids"][0])
    assert all(len(ids) == tokens for ids in reply["ids"])
    return {
        "throughput": tokens * len(last) / max(last),
        "decode": statistics.median((tokens - 1) / (end - begin) for begin, end in zip(first, last, strict=True)),
        "first": statistics.median(first),
        "worst": max(first),
    }


def tables(rounds: Mapping[int, Rounds], memory: Mapping[str, Sequence[int]], reference: str) -> Answer:
    """A table of each kind of figure: a line for each engine, a column for each number of streams."""
    columns, titles = ["streams", *map(str, rounds)], [*memory]

    def median(title: str, count: int, figure: str) -> float:
        return statistics.median(one[title][figure] for one in rounds[count])

    def rows(cell: Callable[[str, int], str], of: Sequence[str] = titles) -> list[list[str]]:
        return [[title, *(cell(title, count) for count in rounds)] for title in of]

    def speed(title: str, count: int) -> str:
        return f"{median(title, count, 'throughput'):.3g} ({median(title, count, 'decode'):.3g})"

    def wait(title: str, count: int) -> str:
        return f"{median(title, count, 'first'):.2g}, {median(title, count, 'worst'):.2g}"

    def ratio(title: str, count: int) -> str:
        found = rounds[count]
        return f"{Spread.of(one[reference]['throughput'] / one[title]['throughput'] for one in found)}"

    yield Table(
        "Tokens per second of all streams together, prompts included; in brackets those that one stream gets after its "
        "first token:",
        columns,
        rows(speed),
    )
    others = [title for title in titles if title != reference]
    if others:
        sentence = f"How many times that of each {reference} reaches, in the same round (median and range):"
        yield Table(sentence, columns, rows(ratio, others))
    yield Table("Seconds to the first token: the median stream's, and the longest:", columns, rows(wait))
    peaks = [[title, *(f"{peak / MIB:.0f}" for peak in of_one)] for title, of_one in memory.items()]
    yield Table("Most resident memory of a fresh process, in MiB:", columns, peaks)

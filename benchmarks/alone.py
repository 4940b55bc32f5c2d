"""Questions about only pastkey, each a function: its arms, and the table of what they measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.runtime import Engine, Generation, Generator, Request, SamplingConfig, load
from pastkey.runtime.bulk.rows import seed_of
from pastkey.runtime.providers.ort import onnxruntime
from pastkey.runtime.sampling.sampler import Sampler

from .measure import (
    MIB,
    Answer,
    Spread,
    Table,
    facts_of,
    fresh_peak,
    interleaved,
    named,
    paired,
    seconds,
)
from .texts import STORY, story_ids

# --- one step -----------------------------------------------------------------------------------------------------
SAMPLING: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.1},
    {"presence_penalty": 0.5},
    {"no_repeat_ngram_size": 3},
    {"dry_multiplier": 0.8},
    {"temperature": 0.8},
    {"temperature": 0.8, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 40},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1},
    {"temperature": 0.8, "top_n_sigma": 1.0},
    {"temperature": 0.8, "typical_p": 0.9},
]
CALLS = 20  # of a sampler in a round
QUESTION = 20  # tokens that follow a cached prefix


def sampling(*, rounds: int = 15) -> Answer:
    """Arms: settings of the sampler. Metric: CPU time of one thread.

    Probabilities fall as rank ** -1.5: about 60 of 49,152 tokens have 0.9 together. The text has 300 tokens.
    """
    generator = np.random.default_rng(0)
    logits = generator.permutation(-1.5 * np.log(np.arange(1, 49_153))).astype(np.float32)
    ids = generator.integers(0, logits.size, 300).tolist()

    def microseconds(sampler: Sampler, _: int) -> float:
        return 1e6 / CALLS * seconds(lambda: [sampler(logits, ids) for _ in range(CALLS)], time.thread_time)

    samplers = {named(one): Sampler(SamplingConfig(seed=1, **one), prompt_tokens=len(ids)) for one in SAMPLING}
    arms = {name: partial(microseconds, sampler) for name, sampler in samplers.items()}
    measured = interleaved(arms, rounds, "sampling")
    rows = [[name, f"{Spread.of(one[name] for one in measured):.0f}"] for name in arms]
    yield Table("CPU time of choosing one of 49,152 tokens, one thread:", ["settings", "µs"], rows)


def step_cost(bundle: Path, *, threads: int = 2, rounds: int = 5, new_tokens: int = 48) -> Answer:
    """Arms: settings of the sampler. Metric: CPU time of one thread, without prompt lookup."""
    settings = {named(one): one for one in SAMPLING if not one or "temperature" in one}
    with load(bundle, threads=threads) as lm:
        onnx, prompt = lm.require_open().graph.onnx, story_ids(lm, 120)
        run, inside = onnx.run_with_iobinding, 0.0

        def timed(*arguments: Any) -> None:
            nonlocal inside
            inside = seconds(lambda: run(*arguments), time.thread_time)

        def stream(one: dict[str, Any], _: int) -> list[tuple[float, float]]:
            """(seconds outside onnxruntime, seconds) of each step."""
            chunks = lm.stream(prompt, max_new_tokens=new_tokens, prompt_lookup=False, seed=1, **one)
            next(chunks)
            found, before = [], time.thread_time()
            for chunk in chunks:
                taken = time.thread_time()
                if chunk.ids:  # the last chunk may be what was held back
                    found.append((taken - before - inside, taken - before))
                before = taken
            return found

        onnx.run_with_iobinding = timed
        try:
            measured = interleaved({name: partial(stream, one) for name, one in settings.items()}, rounds, "step cost")
        finally:
            del onnx.run_with_iobinding
        rows = []
        greedy = statistics.median(whole for one in measured for _, whole in one[named({})])
        for name in settings:
            outside, whole = zip(*(step for one in measured for step in one[name]), strict=True)
            own, step = statistics.median(outside), statistics.median(whole)
            rows.append([name, f"{own * 1e6:.0f}", f"{own / step:.1%}", f"{greedy / step:.2f}"])
        yield Table(
            "CPU time of one step outside onnxruntime, from the logits to the text:",
            ["sampling", "µs", "of the step", "speed, greedy = 1"],
            rows,
        )
        yield facts_of(lm.bundle, threads)


def two_graphs(
    bundle: Path,
    other: Path,
    *,
    threads: int = 1,
    rounds: int = 11,
    contexts: Sequence[int] = (64, 1024, 4096),
    chunk: int = 256,
) -> Answer:
    """Arms: two bundles of one model. Metric: the first's seconds over the other's, of one row of random ids."""
    engines = {
        "first": Engine(open_bundle(bundle), threads=threads),
        "other": Engine(open_bundle(other), threads=threads),
    }
    rows = []
    for context in contexts:
        ids = _random_ids(bundle, context + chunk)
        for engine in engines.values():
            engine.reset()
            engine.prefill(ids[:context])

        def measure(engine: Engine, _: int, context: int = context, ids: list[int] = ids) -> tuple[float, float]:
            """Seconds of a token, and of a chunk of prompt, after the context."""
            token = seconds(lambda: engine.decode(ids[context]))
            engine.trim(context)
            prompt = seconds(lambda: engine.append(ids[context:]))
            engine.trim(context)
            return token, prompt

        measured = interleaved(
            {name: partial(measure, one) for name, one in engines.items()}, rounds, f"{context} tokens"
        )
        ratios = [Spread.of(one["first"][i] / one["other"][i] for one in measured) for i in range(2)]
        rows.append([f"{context}", *(f"{ratio}" for ratio in ratios)])
    yield Table("The first graph's time over the other's:", ["context", "one token", f"{chunk} prompt tokens"], rows)
    yield facts_of(open_bundle(bundle), threads)
    yield facts_of(open_bundle(other), threads)


def prefixes(bundle: Path, *, threads: int = 2, rounds: int = 5, prompt_tokens: int = 480) -> Answer:
    """Arms: prompts whole, and behind a cached prefix. Metric: seconds to the first token.

    Three prefixes are cached at the same time, and in each round another question follows each of them.
    """
    with load(bundle, threads=threads) as lm:
        rng, size = np.random.default_rng(0), lm.manifest.vocab_size
        prefixes = rng.integers(0, size, (3, prompt_tokens)).tolist()
        questions = rng.integers(0, size, (rounds, QUESTION)).tolist()

        def first_token(reuse: bool, number: int) -> float:
            done = [lm.generate([*ids, *questions[number]], max_new_tokens=1, reuse_prefix=reuse) for ids in prefixes]
            assert not reuse or min(one.cached_tokens for one in done) >= prompt_tokens - 2
            found: float = statistics.median(one.prefill_seconds for one in done)
            return found

        for ids in prefixes:
            lm.generate(ids, max_new_tokens=1, reuse_prefix=True)
        arms = {"whole": partial(first_token, False), "cached": partial(first_token, True)}
        measured = interleaved(arms, rounds, "prefixes", warm=False)
        whole, cached = (statistics.median(one[arm] for one in measured) for arm in arms)
        yield (
            f"First token of {prompt_tokens + QUESTION} tokens of prompt: {whole:.3f} s, and {cached:.3f} s where "
            f"the first {prompt_tokens} are one of 3 cached prefixes: {paired(measured, 'whole', 'cached'):.1f} times "
            "as soon."
        )
        yield facts_of(lm.bundle, threads)


# --- generations --------------------------------------------------------------------------------------------------
ORDER = "Anna Smith from Berlin wrote by email, again: she wants twelve apples. The same as JSON:\n"
FIELDS: dict[str, Any] = {
    "name_of_the_customer": {"type": "string", "maxLength": 30},
    "shipping_address_city": {"type": "string", "maxLength": 20},
    "preferred_contact_method": {"enum": ["email", "telephone", "post"]},
    "number_of_items_ordered": {"type": "integer", "minimum": 0, "maximum": 99},
    "is_returning_customer": {"type": "boolean"},
}
SCHEMA = {"type": "object", "properties": FIELDS, "required": [*FIELDS], "additionalProperties": False}


def constrained(bundle: Path, *, threads: int = 2, rounds: int = 9) -> Answer:
    """Arms: free text with and without prompt lookup, a schema, a mask. Metric: seconds per token, prompt included.

    The mask is a pattern that allows every text, which shows only its cost.
    """
    off: dict[str, Any] = {"prompt_lookup": False}
    kinds: dict[str, dict[str, Any]] = {
        "free": {},
        "free without prompt lookup": off,
        "JSON schema": {"json_schema": SCHEMA},
        "any text by a mask, no prompt lookup": off | {"regex": r"[\s\S]*"},
    }
    with load(bundle, threads=threads) as lm:
        whole = lm.generate(ORDER, json_schema=SCHEMA, max_new_tokens=300)

        def per_token(kind: dict[str, Any], _: int) -> float:
            done = lm.generate(ORDER, max_new_tokens=whole.new_tokens, **kind)
            found: float = (done.prefill_seconds + done.decode_seconds) / done.new_tokens
            return found

        measured = interleaved({name: partial(per_token, kind) for name, kind in kinds.items()}, rounds, "constrained")
        free, plain, schema, mask = kinds
        pairs = ((free, schema), (plain, schema), (plain, mask))
        yield Table(
            f"Seconds per token, as a ratio, where {whole.forced_tokens} of {whole.new_tokens} tokens of the JSON are "
            "forced (above 1, the constrained text is faster):",
            ["compared", "ratio"],
            [[f"{above} / {below}", f"{paired(measured, above, below)}"] for above, below in pairs],
        )
        yield facts_of(lm.bundle, threads)


def batch(bundle: Path, *, threads: int = 2, rounds: int = 2, count: int = 32, new_tokens: int = 32) -> Answer:
    """Arms: separate calls, one job. Metric: seconds.

    The rows are different ones, drawn at temperature 0.7, and greedy ones with a common beginning.
    """
    words = STORY.split()
    kinds: dict[str, tuple[list[str], dict[str, Any]]] = {
        "different": (
            [" ".join(words[2 * place : 2 * place + 12]) for place in range(count)],
            {"max_new_tokens": new_tokens, "temperature": 0.7},
        ),
        "with a common beginning": (
            [f"{STORY} {STORY} The {name}" for name in words[: max(1, count // 2)]],
            {"max_new_tokens": max(1, new_tokens // 4)},
        ),
    }
    generator = Generator(bundle, threads=threads)

    def alone(prompts: list[str], options: dict[str, Any]) -> list[str]:
        ask = generator.model.generate
        return [ask(prompt, seed=seed_of(0, number), **options).text for number, prompt in enumerate(prompts)]

    def together(prompts: list[str], options: dict[str, Any]) -> list[str]:
        ids = list(range(len(prompts)))
        columns = {name: [value] * len(ids) for name, value in options.items()}
        return [*generator({"id": ids, "prompt": prompts, **columns})["text"]]

    rows, texts = [], dict[str, list[str]]()
    for kind, (prompts, options) in kinds.items():

        def timed(way: Callable[..., list[str]], _: int, prompts: Any = prompts, options: Any = options) -> float:
            started = time.perf_counter()
            texts[way.__name__] = way(prompts, options)
            return time.perf_counter() - started

        arms = {way.__name__: partial(timed, way) for way in (alone, together)}
        measured = interleaved(arms, rounds, f"batch, rows {kind}", warm=False)
        same = sum(one == other for one, other in zip(texts["alone"], texts["together"], strict=True))
        rows.append([f"{len(prompts)} {kind}", f"{paired(measured, 'alone', 'together'):.1f}", f"{same}"])
    yield Table("Rows of one job over separate calls:", ["rows", "times as fast", "same texts"], rows)
    yield facts_of(generator.model.bundle, threads)


# --- one graph against the runtime ---------------------------------------------------------------------------------
Run = Callable[[list[int], int, SamplingConfig], list[int]]


def _graph(bundle: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    file = str(bundle / names.GENERATE_GRAPH)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(prompt: list[int], new: int, sampling: SamplingConfig) -> list[int]:
        whole = {"max_new_tokens": new, "top_k": sampling.top_k, "seed": sampling.seed}
        feeds = {name: np.array([value], np.int64) for name, value in whole.items()}
        feeds |= {"end_ids": np.zeros(0, np.int64), names.INPUT_IDS: np.array([prompt], np.int64)}
        feeds |= {name: np.array([getattr(sampling, name)], np.float32) for name in names.GENERATE_NUMBERS}
        (ids,) = session.run([names.GENERATED_IDS], feeds)
        return [int(token) for token in ids]

    return run


def _runtime(bundle: Path) -> Run:
    engine = Engine(open_bundle(bundle), threads=1)

    def run(prompt: list[int], new: int, sampling: SamplingConfig) -> list[int]:
        return list(Generation(engine, Request(prompt, max_new_tokens=new, sampling=sampling, prompt_lookup=False)))

    return run


WAYS = {"graph": _graph, "runtime": _runtime}


def one_graph(
    bundle: Path, *, lengths: Sequence[int] = (32, 512, 1500), rounds: int = 9, new_tokens: int = 48
) -> Answer:
    """Arms: generate.onnx, pastkey's loop in Python without prompt lookup. Metric: CPU time of one thread, peak memory.

    The peak is that of a fresh process that does only this.
    """
    ways = {name: make(bundle) for name, make in WAYS.items()}
    new, rows = new_tokens, []
    for length in lengths:
        prompt = _random_ids(bundle, length)
        peaks = [f"{fresh_peak(_run_once, way, bundle, prompt, new) / MIB:.0f}" for way in WAYS]
        for kind, sampling in (
            ("greedy", SamplingConfig(seed=0)),
            ("drawn", SamplingConfig(temperature=0.7, top_p=0.95, seed=0)),
        ):
            equal = ways["graph"](prompt, new, sampling) == ways["runtime"](prompt, new, sampling)

            def timed(run: Run, tokens: int, _: int, prompt: Any = prompt, sampling: Any = sampling) -> float:
                return seconds(lambda: run(prompt, tokens, sampling), time.process_time)

            arms = {f"{name} {n}": partial(timed, run, n) for name, run in ways.items() for n in (1, new)}
            measured = interleaved(arms, rounds, f"{length} tokens, {kind}", warm=False)
            step = Spread.of(
                (one[f"graph {new}"] - one["graph 1"]) / (one[f"runtime {new}"] - one["runtime 1"]) for one in measured
            )
            first = paired(measured, "graph 1", "runtime 1")
            rows.append([f"{length}", kind, f"{step}", f"{first}", ", ".join(peaks), "yes" if equal else "no"])
    columns = [
        "prompt (tokens)",
        "tokens are",
        "a step",
        "prompt and one token",
        "peak (MiB), the runtime's",
        "same ids",
    ]
    yield Table(f"A generation of {new} tokens in one graph, over pastkey's loop in Python:", columns, rows)
    peaks = [f"{fresh_peak(_run_once, way, bundle, [], new) / MIB:.0f}" for way in WAYS]
    yield f"Peak of loading alone: {peaks[0]} MiB, and the runtime's {peaks[1]} MiB."
    yield facts_of(open_bundle(bundle), 1)


def _run_once(way: str, bundle: Path, prompt: list[int], new: int) -> None:
    run = WAYS[way](bundle)
    if prompt:
        run(prompt, new, SamplingConfig(seed=0))


def _random_ids(bundle: Path, length: int) -> list[int]:
    found: list[int] = np.random.default_rng(0).integers(0, open_bundle(bundle).manifest.vocab_size, length).tolist()
    return found


def memory(bundle: Path, *, lengths: Sequence[int] = (1000, 2000, 4000, 8000), new_tokens: int = 1) -> Answer:
    """Arms: a fresh process for each length, of one thread. Metric: its peak less the cache (standard graph: twice)."""
    rows, new = [], new_tokens
    with load(bundle, threads=1) as lm:
        graph = lm.require_open().graph
        for length in lengths:
            cache = graph.cache_bytes(length + new - 1)
            peak = fresh_peak(_generate_once, bundle, _random_ids(bundle, length), new)
            rows.append([f"{length}", f"{(peak - cache) / MIB:.0f}", f"{cache / MIB:.0f}"])
        yield Table(
            f"Resident memory of a prompt and {new} new tokens, in MiB:",
            ["tokens of the prompt", "peak less the cache", "cache"],
            rows,
        )
        yield facts_of(lm.bundle, 1)


def _generate_once(bundle: Path, ids: list[int], new: int) -> None:
    load(bundle, threads=1).generate(ids, max_new_tokens=new, prompt_lookup=False)

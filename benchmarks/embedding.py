"""What embedding costs: streams at the same time beside other engines, and what the runtime adds of its own.

    python -m benchmarks.embedding [BUNDLE] [--rounds 5] [--threads 2] [--streams 1 2 4 8 16] [--only ENGINE ...]
                                   [--work FOLDER] [--out PAGE]

Without BUNDLE it is the int8 export of SmolLM2-135M-Instruct, whose weights the other engines get in any case; each is
installed in an environment of its own. Each finished step is kept in the work folder: after an interruption, the same
command goes on. What stands between the markers of docs/performance.md is replaced and its chart drawn; with --out, of
another page. A page without markers is written whole.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from pastkey.command import Parser, positive_int, say
from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.errors import InputError
from pastkey.runtime import LanguageModel
from pastkey.runtime.text.codec import TextCodec

from . import constrained, sampling
from .environments import ROOT
from .peers import quality, serving
from .peers.convert import open_source, prepare, prepare_all
from .peers.engines import Engine, Prepared
from .peers.environments import versions_of
from .peers.progress import exit_status
from .peers.results import machine, markdown
from .peers.store import Store, digest, digest_of_files

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- streams: python -m benchmarks.embedding -->", "<!-- end of streams -->"
ROUNDS, THREADS = 5, 2
OWN_TOKENS = 48  # of a generation whose steps are timed
PREFIX, QUESTION = 480, 20  # tokens: what several prompts share, and what each has of its own
PREFIXES = 3  # texts that are kept at the same time
SETTINGS = [one for one in sampling.SETTINGS if not one or "temperature" in one]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    return exit_status("benchmarks.embedding", lambda: measure(arguments))


def measure(arguments: argparse.Namespace) -> None:
    """The whole of it, from the bundle to the page."""
    threads, rounds, streams = arguments.threads, arguments.rounds, sorted(set(arguments.streams))
    chosen = _chosen(arguments.only)
    store = Store(arguments.work)
    ours = _prepared(chosen[0], arguments.bundle, store)
    others, skipped = prepare_all(chosen[1:], lambda engine: _prepared(engine, arguments.bundle, store))
    prepared = [ours, *others]
    bundle = open_bundle(ours.model)
    codec = _codec(bundle)
    file, most = quality.text_file(None), max(streams) * rounds
    text = (
        quality.windows_of_own(bundle, ours.identity, max(streams), threads, store)
        if file is None
        else quality.windows_of_file(file, codec, most)
    )
    prompts = [text.prompt(serving.PROMPT, first=number) for number in range(most)]
    raced, load = serving.race(prepared, prompts, streams, rounds, threads, store, serving.NEW)
    peaks = serving.measure_memory(prepared, prompts, streams, threads, store, serving.NEW)
    key = {"engine": ours.identity, "threads": threads, "rounds": rounds, "text": digest(text.windows)}
    own = store.once("embedding-own", key, lambda: _own(bundle, threads, rounds, text))

    reference = ours.engine.name
    found = {
        one.engine.title: {count: serving.figures(raced, one.engine.name, reference, count) for count in streams}
        for one in prepared
    }
    out = arguments.out or (PAGE if _default(arguments) else store.folder / "embedding.md")
    picture = out.with_name(f"{out.stem}-streams.png")
    serving.draw(found, {one.engine.title: one.engine.runtime for one in prepared}, picture)
    parts = [
        f"Each stream has a prompt of {serving.PROMPT} tokens of {text.name} and {serving.NEW} greedy tokens; all "
        f"begin at the same moment. Interleaved rounds, of which medians are given: {rounds}; threads of every engine: "
        f"{threads}.\n",
        serving.tables(found, {one.engine.title: peaks[one.engine.name] for one in prepared}),
        f"![tokens per second and the longest wait, by streams]({picture.name})\n",
        *(f"Not measured: {who}: {why}\n" for who, why in skipped.items()),
        own_page(own),
        "How it was measured:\n",
        *(f"- {line}" for line in [*_engines(prepared), *machine(), _load(load)]),
    ]
    write_page(out, "\n".join(map(_wrapped, "\n".join(parts).split("\n"))) + "\n")
    print("\n".join(parts[1:2]))
    say(f"written: {out} and {picture}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="benchmarks.embedding", description="Measure streams at the same time, and what they cost.")
    parser.add_argument("bundle", nargs="?", type=Path, help="of SmolLM2-135M-Instruct (default: exported anew)")
    parser.add_argument("--rounds", type=positive_int, default=ROUNDS, help=f"interleaved ones (default {ROUNDS})")
    parser.add_argument("--threads", type=positive_int, default=THREADS, help=f"of every engine (default {THREADS})")
    parser.add_argument("--streams", nargs="+", type=positive_int, default=[*serving.STREAMS], help="at the same time")
    names = ", ".join(engine.name for engine in serving.ENGINES)
    parser.add_argument("--only", nargs="+", metavar="ENGINE", help=f"beside pastkey's: {names}")
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "benchmarks" / ".work",
        help="where models and finished steps are kept (the same as that of benchmarks.peers)",
    )
    parser.add_argument("--out", type=Path, help="the page (default: docs/performance.md, a trial's in --work)")
    return parser.parse_args(argv)


def _default(arguments: argparse.Namespace) -> bool:
    """Whether the figures are those that the repository keeps, and not a trial."""
    given = (arguments.rounds, arguments.threads, *arguments.streams)
    return not arguments.only and given == (ROUNDS, THREADS, *serving.STREAMS)


def _chosen(only: Sequence[str] | None) -> list[Engine]:
    """The engines to measure: pastkey first, which the others are compared with."""
    known = {engine.name: engine for engine in serving.ENGINES}
    for name in only or ():
        if name not in known:
            raise InputError(f"no engine {name!r}; the engines are {', '.join(known)}")
    return [engine for place, engine in enumerate(serving.ENGINES) if not place or not only or engine.name in only]


def _prepared(engine: Engine, bundle: Path | None, store: Store) -> Prepared:
    """An engine with its files: pastkey's are those of the bundle, where one is given."""
    if bundle is not None and engine.runtime == "pastkey":
        return _of_bundle(engine, open_bundle(bundle))
    return prepare(engine, open_source(None), store)


def _of_bundle(engine: Engine, bundle: Bundle) -> Prepared:
    python, path = Path(sys.executable), bundle.path.resolve()
    versions = versions_of("pastkey", python)
    size = sum(record.size for record in bundle.manifest.files.values())
    return Prepared(engine, python, path, size, versions, digest([engine.name, digest_of_files(path), versions]))


def _codec(bundle: Bundle) -> TextCodec:
    """Its tokenizer. Raises InputError where it cannot be measured."""
    if bundle.tokenizer is None:
        raise InputError(f"{bundle.path} has no tokenizer, and streams are of texts: give a bundle that has one")
    context, needed = bundle.manifest.context_length, max(serving.PROMPT + serving.NEW, PREFIX + QUESTION + 1)
    if context < needed:
        raise InputError(f"{bundle.path}: the context is {context} tokens; at least {needed} were expected")
    return TextCodec.from_file(bundle.tokenizer)


# --- pastkey alone ------------------------------------------------------------------------------------------------
def _own(bundle: Bundle, threads: int, rounds: int, text: quality.Text) -> dict[str, Any]:
    with LanguageModel(bundle, threads=threads) as lm:
        whole, compared = constrained.measure(lm, rounds)
        return {
            "cost": own_cost(lm, text.prompt(serving.PROMPT), rounds, OWN_TOKENS),
            "prefix": prefixes(lm, text, rounds),
            "forced": [whole.forced_tokens, whole.new_tokens],
            "constrained": compared,
        }


def own_cost(lm: LanguageModel, prompt: Sequence[int], rounds: int, tokens: int) -> list[list[float]]:
    """For each of SETTINGS: microseconds of a step outside onnxruntime, and the share of the step that they are.

    Of a stream with its text, without prompt lookup. Both are this thread's processor time, so that what other programs
    take is in neither; the medians of all steps.
    """
    own: list[list[float]] = [[] for _ in SETTINGS]
    whole: list[list[float]] = [[] for _ in SETTINGS]
    onnx = lm.require_open().graph.onnx
    run, inside = onnx.run_with_iobinding, 0.0

    def timed(*arguments: Any) -> None:
        nonlocal inside
        before = time.thread_time()
        run(*arguments)
        inside = time.thread_time() - before

    onnx.run_with_iobinding = timed
    try:
        for number in range(rounds + 1):
            for settings, outside, steps in zip(SETTINGS, own, whole, strict=True):
                stream = lm.stream(prompt, max_new_tokens=tokens, prompt_lookup=False, seed=1, **settings)
                next(stream)
                before = time.thread_time()
                for chunk in stream:
                    taken = time.thread_time()
                    if number and chunk.ids:  # the first round warms up; the last chunk may be what was held back
                        outside.append(taken - before - inside)
                        steps.append(taken - before)
                    before = taken
    finally:
        del onnx.run_with_iobinding
    medians = [
        (statistics.median(outside), statistics.median(steps)) for outside, steps in zip(own, whole, strict=True)
    ]
    return [[outside * 1e6, outside / step] for outside, step in medians]


def prefixes(lm: LanguageModel, text: quality.Text, rounds: int) -> list[float]:
    """Seconds to the first token of a prompt, and where its beginning is kept: each of several, in turn."""
    whole: list[float] = []
    kept: list[float] = []
    for number in range(rounds):
        shared = [text.prompt(PREFIX, first=number + place) for place in range(PREFIXES)]
        for ids in shared:
            lm.generate(ids, max_new_tokens=1, reuse_prefix=True)
        question = text.prompt(QUESTION, first=number + PREFIXES)
        for ids in shared:
            whole.append(lm.generate([*ids, *question], max_new_tokens=1).prefill_seconds)
            done = lm.generate([*ids, *question], max_new_tokens=1, reuse_prefix=True)
            assert done.cached_tokens >= PREFIX - 2
            kept.append(done.prefill_seconds)
    return [statistics.median(whole), statistics.median(kept)]


# --- the page -----------------------------------------------------------------------------------------------------
def own_page(own: Mapping[str, Any]) -> str:
    """What `_own` has measured."""
    forced, tokens = own["forced"]
    whole, kept = own["prefix"]
    named = [", ".join(f"{name}={value}" for name, value in one.items()) or "greedy" for one in SETTINGS]
    cost = [[name, f"{us:.0f}", f"{share:.1%}"] for name, (us, share) in zip(named, own["cost"], strict=True)]
    held = [
        [name, f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"]
        for name, found in own["constrained"].items()
    ]
    return "\n".join(
        [
            "What one stream's step costs outside onnxruntime, from the logits to the text:\n",
            markdown([["sampling", "µs", "of the step"], *cost]),
            f"Seconds per token, as a ratio, where {forced} of {tokens} tokens of the JSON are forced:\n",
            markdown([["compared", "ratio"], *held]),
            f"First token of {PREFIX + QUESTION} tokens of prompt: {whole:.3f} s, and {kept:.3f} s where the first "
            f"{PREFIX} are one of {PREFIXES} kept prefixes: {whole / kept:.1f} times as soon.\n",
        ]
    )


def _engines(prepared: Sequence[Prepared]) -> list[str]:
    versions = {one.engine.runtime: one.versions for one in prepared}.values()
    return [
        *(f"{one.engine.title}: {one.engine.how}" for one in prepared),
        "; ".join(", ".join(f"{name} {version}" for name, version in of_one.items()) for of_one in versions),
    ]


def _load(load: float) -> str:
    cores = os.cpu_count() or 1
    busy = load > 2 * cores + 2  # more than one engine's own threads
    remark = (
        "; other programs ran meanwhile: ratios count, and speeds are those of a part of the machine" if busy else ""
    )
    return f"load average {load:.1f} on {cores} cores{remark}"


def _wrapped(line: str) -> str:
    """A line of prose as several; one of a table, or with a picture, stays."""
    indent = "  " if line.startswith("- ") else ""
    return line if line.startswith(("|", "!")) else textwrap.fill(line, 120, subsequent_indent=indent)


def write_page(page: Path, section: str) -> None:
    """Puts the section between the page's markers; a page that has none is the section alone."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, _, rest = text.partition(BEGIN) if BEGIN in text else ("", "", "")
    after = rest.partition(END)[2] or "\n"
    page.write_text(f"{before}{BEGIN}\n{section}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

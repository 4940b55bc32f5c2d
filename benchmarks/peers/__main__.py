"""pastkey beside onnxruntime-genai, llama.cpp, optimum-onnx and transformers, on the same weights and this machine.

    python -m benchmarks.peers [--full] [--rounds 11] [--model GGUF_OR_HF_FOLDER] [--text FILE] [--work FOLDER]
                               [--only ENGINE ...] [--fresh] [--out FOLDER]

The first run installs every engine in an environment of its own. Each finished step is kept in the work folder: after
an interruption, the same command goes on. Results go to results.md and results.png here; those of other engines,
weights, texts, rounds or threads than the default ones go to the work folder.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from pastkey.command import Parser, positive_int, say
from pastkey.contract.bundle import open_bundle
from pastkey.errors import InputError
from pastkey.runtime.text.codec import TextCodec

from . import chart, quality, results, scaling, speed
from .convert import Source, open_source, prepare, prepare_all
from .engines import ENGINES, REFERENCE, Engine, Worker
from .progress import exit_status
from .results import Row, Settings
from .store import Store, make_folder

HERE = Path(__file__).parent.parent
ROUNDS, THREADS = 11, 2


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    return exit_status("benchmarks.peers", lambda: measure(arguments))


def measure(arguments: argparse.Namespace) -> None:
    """The whole of it, from weights to a page."""
    engines = _chosen(arguments.only, arguments.full)
    threads, count = arguments.threads, 24 if arguments.full else 6
    cores = os.cpu_count() or 1
    if threads > cores:
        raise InputError(f"--threads is {threads}; this machine has {cores} cores")
    file = quality.text_file(arguments.text)
    source = open_source(arguments.model)
    if arguments.out is not None:
        make_folder(arguments.out, "--out")
    store = Store(arguments.work, fresh=arguments.fresh)

    reference = prepare(REFERENCE, source, store)
    bundle = open_bundle(reference.model)
    codec = _codec(bundle.tokenizer, source)
    whole = (
        quality.windows_of_own(bundle, reference.identity, count, threads, store)
        if file is None
        else quality.windows_of_file(file, codec, max(count, speed.STRIDE * arguments.rounds))
    )
    text = dataclasses.replace(whole, windows=whole.windows[:count])
    context_length = bundle.manifest.context_length
    shapes = [
        shape for shape in (speed.SHORT, speed.LONG) if shape.length <= context_length and shape.prompt <= whole.tokens
    ]
    if speed.SHORT not in shapes:
        raise InputError(f"the context of {source.name} is {context_length} tokens; {speed.SHORT.length} are needed")
    if speed.LONG not in shapes:
        say(f"without {speed.LONG.prompt} tokens of prompt: the text has {whole.tokens}, the context {context_length}")
    prompts = quality.question_ids(bundle, codec)

    others, skipped = prepare_all(engines[1:], lambda engine: prepare(engine, source, store))
    prepared = [reference, *others]
    context = max(shape.length for shape in shapes)
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(one, threads=threads, context=context, logs=store.logs)) for one in prepared
        ]
        windows = quality.measure_windows(workers, prepared, text, threads, store)
        answers = quality.measure_answers(workers, prepared, prompts, threads, store)
        rounds = speed.race(workers, prepared, whole, shapes, arguments.rounds, threads, store)
    loads = speed.measure_loads(prepared, text, context, threads, store)
    peaks = speed.measure_memory(prepared, text, threads, store)

    rivals = [one.engine.name for one in prepared if one.engine.rival]
    rows = [
        Row(
            engine=one.engine,
            versions=one.versions,
            size=one.size,
            quality=quality.summary(
                windows[name], answers[name], answers[REFERENCE.name], bundle.manifest.eos_token_ids
            ),
            speeds={shape.prompt: speed.median_speed(rounds, name, shape.prompt) for shape in shapes},
            ratios={
                (shape.prompt, phase): speed.ratio(rounds, name, rivals, shape.prompt, phase)
                for phase in ("prefill", "decode")
                for shape in shapes
                if rivals
            },
            load=loads[name],
            peak_bytes=peaks[name],
        )
        for one in sorted(prepared, key=lambda one: ENGINES.index(one.engine))
        for name in [one.engine.name]
    ]
    folder = arguments.out or (HERE if _default(arguments) else store.folder)
    charts: list[Path] = []
    int8 = next((one for one in prepared if one.engine.name == "pastkey-int8"), None)
    if arguments.full and int8 is not None:
        charts, too_large = scaling.measure(int8, threads, store, HERE.parent / "docs" if folder == HERE else folder)
        skipped |= too_large
    settings = Settings(
        model=source.name,
        text=text.name,
        windows=len(text.windows),
        places=speed.places(whole, arguments.rounds),
        rounds=arguments.rounds,
        threads=threads,
        command=_command(arguments, file),
    )
    _write(rows, skipped, settings, charts, folder)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="benchmarks.peers", description="Measure pastkey beside other engines on the same weights.")
    parser.add_argument("--full", action="store_true", help="more engines, more windows, and how pastkey scales")
    parser.add_argument(
        "--rounds", type=positive_int, default=ROUNDS, help=f"of the interleaved speed runs (default {ROUNDS})"
    )
    parser.add_argument("--threads", type=positive_int, default=THREADS, help=f"of every engine (default {THREADS})")
    parser.add_argument("--model", type=Path, help="a .gguf file or a Hugging Face folder (default: SmolLM2-135M)")
    parser.add_argument(
        "--text",
        type=Path,
        help="what is measured on (default: wikitext-2 in ../shared where it is, else a text of the model's own)",
    )
    parser.add_argument("--work", type=Path, default=HERE / ".work", help="where models and finished steps are kept")
    parser.add_argument("--only", nargs="+", metavar="ENGINE", help=", ".join(engine.name for engine in ENGINES))
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    parser.add_argument("--out", type=Path, help="the folder for results.md and results.png")
    return parser.parse_args(argv)


def _chosen(only: Sequence[str] | None, full: bool) -> list[Engine]:
    """The engines to measure, the reference first."""
    known = {engine.name: engine for engine in ENGINES}
    for name in only or ():
        if name not in known:
            raise InputError(f"no engine {name!r}; the engines are {', '.join(known)}")
    wanted = [known[name] for name in dict.fromkeys(only)] if only else [e for e in ENGINES if full or not e.full]
    return [REFERENCE, *(engine for engine in wanted if engine is not REFERENCE)]


def _codec(tokenizer: Path | None, source: Source) -> TextCodec:
    if tokenizer is None:
        raise InputError(f"{source.name} has no tokenizer, and quality is measured on a text: add its tokenizer.json")
    return TextCodec.from_file(tokenizer)


def _default(arguments: argparse.Namespace) -> bool:
    """Whether the results are those that the repository keeps, and not a trial."""
    others = (arguments.only, arguments.model, arguments.text)
    return not any(others) and (arguments.rounds, arguments.threads) == (ROUNDS, THREADS)


def _command(arguments: argparse.Namespace, text: Path | None) -> str:
    """What to type to measure the same again; a file by its name alone."""
    parts = ["python -m benchmarks.peers"]
    parts += ["--full"] * arguments.full
    parts += [f"--{name} {file.name}" for name, file in (("model", arguments.model), ("text", text)) if file]
    parts += [f"--only {' '.join(arguments.only)}"] if arguments.only else []
    return " ".join([*parts, f"--rounds {arguments.rounds} --threads {arguments.threads}"])


def _write(
    rows: Sequence[Row], skipped: dict[str, str], settings: Settings, charts: Sequence[Path], folder: Path
) -> None:
    """results.md and results.png, and the table on standard output."""
    if rows[0].ratios:
        chart.draw(rows, folder / "results.png")
    shown = [os.path.relpath(file, folder) for file in charts]
    page = results.page(rows, skipped, settings, chart="results.png", more=shown)
    (folder / "results.md").write_text(page, encoding="utf-8")
    print(results.table(rows))
    say(f"written: {folder / 'results.md'}")


if __name__ == "__main__":
    sys.exit(main())

"""`pastkey bench`: how fast a bundle prefills and decodes here, how long it loads, how much memory it needs."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import pastkey
from pastkey.command import Command, natural_int, positive_int, print_json, say
from pastkey.contract.bundle import open_bundle
from pastkey.values import is_int, require

from ..options import PlacementOptions
from ..sandbox.relay import run_limited
from ..settings import BENCH_NEW_TOKENS, BENCH_PROMPT_TOKENS
from .flags import add_bundle, add_device, limits_of, opening_of

ROUNDS = 3  # each a prefill and a decode; the figures are medians over them


@dataclass(frozen=True)
class BenchReport:
    """The figures of one bundle on one machine."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None  # None when the context has no room for a new token
    load_seconds: float  # from the folder to an engine that can run, without hashing
    peak_rss_bytes: int | None  # of the whole process so far; None where the system does not say
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def bench(
    path: str | Path,
    *,
    prompt_tokens: int = BENCH_PROMPT_TOKENS,
    new_tokens: int = BENCH_NEW_TOKENS,
    **placement: Unpack[PlacementOptions],
) -> BenchReport:
    """Measures prefill and decode over random ids, whatever the model says.

    Args:
        path: A bundle.
        prompt_tokens: Tokens of the prefill. Both lengths are clamped to the context, and a note in the settings says
            so.
        new_tokens: Tokens that are decoded after it.
        **placement: Where it runs, as for `load`.

    Returns:
        Medians over ROUNDS prefills and decodes, and the settings.

    Raises:
        MissingFileError: No bundle is there.
        IntegrityError: The bundle was altered, or its graph cannot be loaded.
        ProviderError: A provider is not here, did not start, or is not given this bundle's graph, or leaves some of it.
        InputError: An impossible number of threads or tokens.
    """
    import numpy as np

    from ..engine.engine import Engine
    from ..engine.golden import require_golden
    from ..providers.ort import onnxruntime

    for name, tokens in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens)):
        require(is_int(tokens, 0, 10**9), name, tokens, "a whole number from 0 to 10**9")
    started = time.perf_counter()
    bundle = open_bundle(path, verify=False)
    engine = Engine(bundle, **placement)
    require_golden(engine, bundle)
    load_seconds = time.perf_counter() - started

    context = bundle.manifest.context_length
    prompt, new = clamp(prompt_tokens, new_tokens, context)
    ids = np.random.default_rng(0).integers(0, bundle.manifest.vocab_size, prompt + new)
    engine.prefill(ids[: min(prompt, 16)])  # the first run of all also prepares the kernels
    prefill_seconds, decode_seconds = [], []
    for _ in range(ROUNDS):
        engine.reset()
        started = time.perf_counter()
        engine.prefill(ids[:prompt])
        between = time.perf_counter()
        for token in ids[prompt:].tolist():
            engine.decode(token)
        prefill_seconds.append(between - started)
        decode_seconds.append(time.perf_counter() - between)

    settings = {
        "prompt_tokens": prompt,
        "new_tokens": new,
        "rounds": ROUNDS,
        "context_length": context,
        "graph": bundle.manifest.graph,
        "precision": bundle.manifest.precision,
        "provider": engine.providers[0],
        "threads": engine.graph.threads,
        "kernels": engine.graph.kernels,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "pastkey": pastkey.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }
    if (prompt, new) != (prompt_tokens, new_tokens):
        settings["note"] = (
            f"the context is {context}: {prompt} + {new} tokens were measured, not {prompt_tokens} + {new_tokens}"
        )
    return BenchReport(
        prefill_tokens_per_second=prompt / statistics.median(prefill_seconds),
        decode_tokens_per_second=new / statistics.median(decode_seconds) if new else None,
        load_seconds=load_seconds,
        peak_rss_bytes=peak_rss_bytes(),
        settings=settings,
    )


def clamp(prompt_tokens: int, new_tokens: int, context: int) -> tuple[int, int]:
    """Prompt and new tokens that fit the context together: new ones are half of it at most."""
    if prompt_tokens + new_tokens <= context:
        return prompt_tokens, new_tokens
    new = min(new_tokens, context // 2)
    return min(prompt_tokens, context - new), new


def peak_rss_bytes() -> int | None:
    """The most memory this process has held at once, or None where that cannot be known."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux; its getrusage would also count memory of the parent process
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if lines:
            return int(lines[0].split()[1]) * 1024
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- the command --------------------------------------------------------------------------------------------------
def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument(
        "--prompt-tokens",
        metavar="N",
        type=positive_int,
        default=BENCH_PROMPT_TOKENS,
        help="prompt tokens to prefill",
    )
    parser.add_argument("--new-tokens", metavar="N", type=natural_int, default=BENCH_NEW_TOKENS, help="decode so many")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_device(parser)


def _run(arguments: argparse.Namespace) -> int:
    if (limits := limits_of(arguments)) is not None:
        return run_limited("bench", _run, arguments, limits)
    opening = opening_of(arguments)
    report = bench(arguments.bundle, prompt_tokens=arguments.prompt_tokens, new_tokens=arguments.new_tokens, **opening)
    if arguments.json:
        print_json(report.to_json())
    else:
        _print_report(report)
    return 0


def _print_report(report: BenchReport) -> None:
    settings = dict(report.settings)
    note = settings.pop("note", None)
    decode, memory = report.decode_tokens_per_second, report.peak_rss_bytes
    print(f"prefill  {report.prefill_tokens_per_second:10.1f} tokens/s  ({settings['prompt_tokens']} tokens)")
    print(f"decode   {decode:10.1f} tokens/s  ({settings['new_tokens']} tokens)" if decode else "decode   no room")
    print(f"load     {report.load_seconds:10.3f} s")
    print(f"memory   {memory / 2**20:10.1f} MiB at the peak" if memory else "memory   unknown on this system")
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    if note:
        say(f"note: {note}")


bench_command = Command(_add_arguments, _run)

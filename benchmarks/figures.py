"""The figures of docs/performance.md, measured on the bundles of `make demo` and written between its two markers.

    python -m benchmarks.figures demo [--rounds 11]

Speeds are ratios of runs that alternate in one process, so that a noisy machine treats both alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pastkey.contract import names
from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.runtime import Engine
from pastkey.runtime.providers.ort import onnxruntime

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- figures: benchmarks.figures -->", "<!-- end of figures -->"
PROMPT, NEW = 128, 64  # tokens; together the demo's context
TURNS = 9  # of a bundle in a round


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the demo's figures.")
    parser.add_argument("demo", type=Path, help="the folder of `make demo`")
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    fp32, int8 = (open_bundle(arguments.demo / name) for name in ("fp32", "int8"))
    stories = subprocess.run(
        [sys.executable, "-m", "benchmarks.stories", str(fp32.path), str(int8.path), "--json", "--count", "200"],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    table = "\n".join(rows(fp32, int8, json.loads(stories.stdout), arguments.rounds, arguments.demo))
    print(table)
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    return 0


def rows(fp32: Bundle, int8: Bundle, stories: dict[str, float], rounds: int, demo: Path) -> list[str]:
    """The lines of the table."""
    sizes = [weight_bytes(bundle) for bundle in (fp32, int8)]
    prefill, decode = speed_ratios(fp32, int8, rounds)
    parity = fp32.manifest.parity["fp32"]["checks"]
    worst = max(check["value"] for check in parity.values() if check["measure"] == "max_relative_difference")
    training = json.loads((demo / "checkpoint" / "pastkey.json").read_text(encoding="utf-8"))["training"]["figures"]
    imports = [
        1e3 * import_seconds("pastkey", beforehand="sys"),
        1e3 * import_seconds("pastkey.runtime.model.language_model", beforehand="numpy, onnxruntime"),
    ]
    return [
        "| | float32 | int8 |",
        "|---|---|---|",
        f"| weights | {sizes[0] / 1e6:.2f} MB | {sizes[1] / 1e6:.2f} MB, {sizes[1] / sizes[0]:.3f} of float32 |",
        f"| largest difference from torch, of the largest logit, over all checks | {worst:.1e} | |",
        f"| KL divergence from float32, top-1 agreement | | {int8.manifest.quality['kl_divergence']:.1e} nats, "
        f"{int8.manifest.quality['top1_agreement']:.1%} |",
        f"| stories that the grammar accepts (200, temperature 0.7) | {stories[str(fp32.path)]:.1%} | "
        f"{stories[str(int8.path)]:.1%} |",
        f"| prefill of {PROMPT} tokens, speed | 1 | {prefill} |",
        f"| decode of {NEW} tokens after them, speed | 1 | {decode} |",
        "",
        f"The decoder of `make demo` ({describe(training)}); medians of {rounds} interleaved rounds of {TURNS} runs "
        f"each, with their range; {Engine(int8).graph.threads} threads, accuracy level 4, shared cache buffer, CPU; "
        f"onnxruntime {onnxruntime.__version__}, numpy {np.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}.",
        "",
        f"`import pastkey` takes {imports[0]:.0f} ms, and `import pastkey.runtime` with its session "
        f"{imports[1]:.0f} ms more than numpy and onnxruntime (medians of 11 processes).",
    ]


def describe(training: dict[str, float]) -> str:
    return f"held-out loss {training['val_loss']:.3f} nats per token, {training['bits_per_byte']:.3f} bits per byte"


def weight_bytes(bundle: Bundle) -> int:
    return sum(record.size for name, record in bundle.manifest.files.items() if names.is_weights_file(name))


def speed_ratios(fp32: Bundle, int8: Bundle, rounds: int) -> tuple[str, str]:
    """Speed of int8 over float32, "median (least to most)", for prefill and decode."""
    sessions = [Engine(bundle) for bundle in (fp32, int8)]
    ids = np.random.default_rng(0).integers(0, fp32.manifest.vocab_size, PROMPT + NEW)
    ratios: dict[str, list[float]] = {"prefill": [], "decode": []}
    for number in tqdm(range(rounds + 1), desc="speed", disable=not sys.stderr.isatty()):
        order = sessions if number % 2 else sessions[::-1]
        taken = {id(session): timed(session, ids) for session in order}
        if number:  # the first round warms up
            for phase, ratio in ratios.items():
                ratio.append(taken[id(sessions[0])][phase] / taken[id(sessions[1])][phase])
    prefill, decode = (
        f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in (ratios["prefill"], ratios["decode"])
    )
    return prefill, decode


def timed(session: Engine, ids: np.ndarray) -> dict[str, float]:
    """Seconds of each phase: medians, since a prefill of a decoder this small takes milliseconds."""
    prefill, decode = [], []
    for _ in range(TURNS):
        session.reset()
        prefill.append(seconds(lambda: session.prefill(ids[:PROMPT])))
        decode.append(seconds(lambda: [session.decode(int(token)) for token in ids[PROMPT:]]))
    return {"prefill": statistics.median(prefill), "decode": statistics.median(decode)}


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def import_seconds(module: str, beforehand: str) -> float:
    """Median seconds that importing a module takes in a fresh process, after `beforehand`."""
    code = (
        f"import os; os.environ['ORT_DISABLE_TELEMETRY'] = '1'; import {beforehand}, time; t = time.perf_counter(); "
        f"import {module}; print(time.perf_counter() - t)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(11)
    ]
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())

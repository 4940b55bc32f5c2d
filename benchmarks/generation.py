"""A whole generation in one graph beside the runtime's loop: time of a step, of a prompt, and memory.

    python -m benchmarks.generation BUNDLE     # made by `pastkey export ... --generate`

Times are processor time on one thread, in interleaved rounds; the ratio is the graph's over the runtime's, which
decodes one token after another here, without prompt lookup. Memory is the peak of a process that does only this.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.runtime import Engine, Generation, Request, SamplingConfig
from pastkey.runtime.providers.ort import onnxruntime

NEW, ROUNDS = 48, 9
GREEDY = SamplingConfig(seed=0)
DRAWN = SamplingConfig(temperature=0.7, top_p=0.95, seed=0)
Run = Callable[[list[int], int, SamplingConfig], list[int]]


def graph(bundle: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(bundle / names.GENERATE_GRAPH), options, providers=["CPUExecutionProvider"]
    )

    def run(prompt: list[int], new: int, sampling: SamplingConfig) -> list[int]:
        feeds = settings(sampling, new) | {names.INPUT_IDS: np.array([prompt], np.int64)}
        (ids,) = session.run([names.GENERATED_IDS], feeds)
        return [int(token) for token in ids]

    return run


def runtime(bundle: Path) -> Run:
    engine = Engine(open_bundle(bundle), threads=1, int8_kv_from=None)

    def run(prompt: list[int], new: int, sampling: SamplingConfig) -> list[int]:
        return list(Generation(engine, Request(prompt, max_new_tokens=new, sampling=sampling, prompt_lookup=False)))

    return run


def settings(sampling: SamplingConfig, new: int) -> dict[str, Any]:
    """As the graph takes them; without the exporter, whose imports would count as memory."""
    whole = {"max_new_tokens": new, "top_k": sampling.top_k, "seed": sampling.seed}
    feeds = {name: np.array([value], np.int64) for name, value in whole.items()} | {"end_ids": np.zeros(0, np.int64)}
    return feeds | {name: np.array([getattr(sampling, name)], np.float32) for name in names.GENERATE_NUMBERS}


WAYS = {"graph": graph, "runtime": runtime}


def seconds(run: Run, prompt: list[int], new: int, sampling: SamplingConfig) -> float:
    started = time.process_time()
    run(prompt, new, sampling)
    return time.process_time() - started


def compare(bundle: Path, lengths: list[int]) -> None:
    manifest = open_bundle(bundle).manifest
    ways = {name: make(bundle) for name, make in WAYS.items()}
    rng = np.random.default_rng(0)
    for length in lengths:
        prompt = rng.integers(0, manifest.vocab_size, length).tolist()
        for kind, sampling in (("greedy", GREEDY), ("drawn", DRAWN)):
            steps, prefills = [], []
            equal = ways["graph"](prompt, NEW, sampling) == ways["runtime"](prompt, NEW, sampling)
            for _ in range(ROUNDS):
                one = {name: seconds(run, prompt, 1, sampling) for name, run in ways.items()}
                many = {name: seconds(run, prompt, NEW, sampling) for name, run in ways.items()}
                steps.append((many["graph"] - one["graph"]) / (many["runtime"] - one["runtime"]))
                prefills.append(one["graph"] / one["runtime"])
            print(
                f"{length:5d} tokens, {kind:6}: a step {np.median(steps):.2f} ({min(steps):.2f} to {max(steps):.2f}), "
                f"prompt and one token {np.median(prefills):.2f}; ids {'equal' if equal else 'differ'}",
                flush=True,
            )


def memory(bundle: Path, lengths: list[int]) -> None:
    for length in (0, *lengths):
        peaks = []
        for name in WAYS:
            command = [sys.executable, "-m", "benchmarks.generation", str(bundle), "--peak", name, str(length)]
            peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        what = f"a prompt of {length} and {NEW} tokens" if length else "load"
        print(f"peak MiB, {what}: graph {peaks[0] / 1024:.0f}, runtime {peaks[1] / 1024:.0f}", flush=True)


def peak(bundle: Path, way: str, length: int) -> None:
    run = WAYS[way](bundle)
    if length:
        run(np.random.default_rng(0).integers(0, 1000, length).tolist(), NEW, GREEDY)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 512, 1500])
    parser.add_argument("--peak", nargs=2, metavar=("WAY", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak is not None:
        peak(arguments.bundle, arguments.peak[0], int(arguments.peak[1]))
        return
    print(f"onnxruntime {onnxruntime.__version__}, numpy {np.__version__}, {os.cpu_count()} processors, one thread")
    compare(arguments.bundle, arguments.lengths)
    memory(arguments.bundle, arguments.lengths)


if __name__ == "__main__":
    main()

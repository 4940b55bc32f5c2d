"""The memory of a prompt by its length: the peak of a fresh process over its prefill, less what its cache takes.

    python -m benchmarks.memory BUNDLE [--lengths 1000 2000 4000 8000] [--new-tokens 1]

One thread. Tokens behind the first are decoded, over the int8 cache where the bundle has one. Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from pastkey.runtime import load
from pastkey.runtime.providers.ort import onnxruntime

from .peers.workers.protocol import peak_rss_bytes


def peak(bundle: Path, length: int, new: int) -> None:
    """Prints the peak of this process, and the bytes of the cache: of a standard graph twice, as a run holds it."""
    model = load(bundle, threads=1)
    ids = np.random.default_rng(0).integers(0, model.manifest.vocab_size, length).tolist()
    model.generate(ids, max_new_tokens=new, prompt_lookup=False)
    graph = model.require_open().graph
    if new == 1:
        graph.int8_kv_from = sys.maxsize  # nothing was decoded: no int8 cache stands beside the other
    print(peak_rss_bytes(), graph.cache_bytes(length + new - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000, 4000, 8000], help="tokens")
    parser.add_argument("--new-tokens", type=int, default=1)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)  # in the fresh process
    arguments = parser.parse_args()
    if arguments.peak is not None:
        peak(arguments.bundle, arguments.peak, arguments.new_tokens)
        return
    print(f"onnxruntime {onnxruntime.__version__}; MiB beside the cache, and of the cache")
    for length in arguments.lengths:
        command = [sys.executable, "-m", "benchmarks.memory", arguments.bundle, "--peak", str(length)]
        command += ["--new-tokens", str(arguments.new_tokens)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        whole, cache = map(int, done.stdout.split())
        print(f"{length:5d} tokens: {(whole - cache) / 2**20:.0f}, {cache / 2**20:.0f}", flush=True)


if __name__ == "__main__":
    main()

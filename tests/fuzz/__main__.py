"""python -m tests.fuzz: many inputs to every reader, each target in a process that may hang or crash.

A finding is written to build/fuzz/TARGET/SEED. `--seed N --target X` repeats one. With atheris, `--guided` lets it
choose the inputs by what they reach, starting from valid files and the regressions.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOUND = ROOT / "build" / "fuzz"
HANG_SECONDS = 20.0  # without a line from the child
_MEMORY = 6 << 30  # bytes that a child may map: an input that takes more ends in a MemoryError, or a crash


def child(name: str, first: int, last: int) -> int:
    """Runs seeds and prints a line of JSON for each that is no value or sentence, and one for every hundred."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    from .check import input_of, outcome
    from .targets import TARGETS

    target = TARGETS[name]
    counts: collections.Counter[str] = collections.Counter()
    for seed in range(first, last):
        print(json.dumps({"at": seed}), flush=True) if target.native or seed % 20 == 0 else None
        content = input_of(target, seed)
        found = outcome(target, content)
        counts[found.kind] += 1
        if not found.well:
            place = FOUND / name
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{seed}").write_bytes(content)
            print(json.dumps({"finding": found.kind, "seed": seed, "told": found.told}), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps({"done": last - first, "counts": counts, "peak_mib": peak}), flush=True)
    return 0


def run(name: str, first: int, inputs: int) -> dict[str, int]:
    """So many inputs from a seed on, in children that are started again behind an input that ends one."""
    figures: dict[str, int] = collections.Counter()
    seed, last = first, first + inputs
    while seed < last:
        command = [sys.executable, "-X", "faulthandler", "-m", "tests.fuzz", "--child", name, str(seed), str(last)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            seed, ended = _follow(process, name, seed, figures)
        if not ended:
            seed += 1
    return figures


def _follow(process: subprocess.Popen[bytes], name: str, seed: int, figures: dict[str, int]) -> tuple[int, bool]:
    """Reads a child's lines until it ends, or says nothing for too long."""
    import selectors

    assert process.stdout is not None
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    buffer, started, first = b"", False, seed
    while True:
        if not selector.select(HANG_SECONDS if started else 240.0):
            process.kill()
            print(f"{name}: no answer at seed {seed} or the few behind it", flush=True)
            figures["hangs"] += 1
            figures["inputs"] += seed - first
            return seed + (19 if not started or seed % 20 == 0 else 0), False
        chunk = os.read(process.stdout.fileno(), 1 << 16)
        if not chunk:
            process.wait()
            print(f"{name}: the process ended with {process.returncode} at seed {seed} or behind it", flush=True)
            figures["crashes"] += 1
            figures["inputs"] += seed - first
            return seed + (19 if seed % 20 == 0 else 0), False
        started = True
        buffer += chunk
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            said = json.loads(line)
            seed = said.get("at", seed)
            if "finding" in said:
                figures[said["finding"]] += 1
                print(f"{name} {said['seed']}: {said['finding']}: {said['told'][-600:]}", flush=True)
            if "done" in said:
                figures["inputs"] += said["done"]
                figures["peak_mib"] = max(figures["peak_mib"], said["peak_mib"])
                for kind in ("value", "sentence"):
                    figures[kind] += said["counts"].get(kind, 0)
                return seed + said["done"] + 20, True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, help="go on for so long, all targets in turn")
    parser.add_argument("--inputs", type=int, default=1000, help="of each target in a turn (default 1000)")
    parser.add_argument("--target", action="append", help="only this one; may be given several times")
    parser.add_argument("--seed", type=int, help="the first seed; by default another each time")
    parser.add_argument("--guided", action="store_true", help="by atheris, for --minutes altogether")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child[0], *map(int, arguments.child[1:]))
    from .targets import TARGETS

    chosen = arguments.target or list(TARGETS)
    if arguments.guided:
        from .guided import run_guided

        return run_guided(chosen, arguments.minutes or 1.0)
    seed = arguments.seed if arguments.seed is not None else time.time_ns() % 2**40
    ends = time.monotonic() + 60 * (arguments.minutes or 0)
    failed = False
    while True:
        for name in chosen:
            figures = run(name, seed, arguments.inputs)
            failed |= any(figures.get(kind) for kind in ("traceback", "slow", "hangs", "crashes"))
            print(f"{name}: {json.dumps(figures)} from seed {seed}", flush=True)
            if arguments.minutes and time.monotonic() > ends:
                return int(failed)
        seed += arguments.inputs
        if time.monotonic() > ends:
            return int(failed)


if __name__ == "__main__":
    sys.exit(main())

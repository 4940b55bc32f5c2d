"""python -m tests.fuzz: many inputs to every reader, each target in a process that may hang or crash.

A finding is written to build/fuzz/TARGET/SEED. `--seed N --target X` repeats one.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOUND = ROOT / "build" / "fuzz"
HANG_SECONDS = 20.0
_MEMORY = 6 << 30  # bytes that a child may map: an input that takes more ends in a MemoryError, or a crash


def child(name: str, first: int, last: int) -> int:
    """Runs seeds, and prints a line of JSON for each: what came of it. Ends where one hangs."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    from .check import input_of, outcome
    from .targets import TARGETS

    target = TARGETS[name]
    for seed in range(first, last):
        print(json.dumps({"seed": seed}), flush=True)
        content = input_of(target, seed)
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        found = outcome(target, content)
        faulthandler.cancel_dump_traceback_later()
        if not found.well:
            (FOUND / name).mkdir(parents=True, exist_ok=True)
            (FOUND / name / f"{seed}").write_bytes(content)
        print(json.dumps({"seed": seed, "kind": found.kind, "told": found.told[-600:]}), flush=True)
    return 0


def run(name: str, first: int, inputs: int) -> dict[str, int]:
    """So many inputs from a seed on, in children that are started again behind an input that ends one."""
    figures: dict[str, int] = collections.Counter()
    seed, last = first, first + inputs
    while seed < last:
        command = [sys.executable, "-X", "faulthandler", "-m", "tests.fuzz", "--child", name, str(seed), str(last)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        said = [json.loads(line) for line in done.stdout.splitlines()]
        if not said:
            raise RuntimeError(f"{name}: no input was tried: {done.stderr[-600:]}")
        for found in said:
            if "kind" in found:
                figures[found["kind"]] += 1
                if found["kind"] not in ("value", "sentence"):
                    print(f"{name} {found['seed']}: {found['kind']}: {found['told']}", flush=True)
        seed = said[-1]["seed"] + 1
        if done.returncode:
            figures["hangs or crashes"] += 1
            told = f"the process ended with {done.returncode}: {done.stderr[-600:]}"
            print(f"{name} {seed - 1}: {told}", flush=True)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, help="go on for so long, all targets in turn")
    parser.add_argument("--inputs", type=int, default=1000, help="of each target in a turn (default 1000)")
    parser.add_argument("--target", action="append", help="only this one; may be given several times")
    parser.add_argument("--seed", type=int, help="the first seed; by default another each time")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child[0], *map(int, arguments.child[1:]))
    from .targets import TARGETS

    seed = arguments.seed if arguments.seed is not None else time.time_ns() % 2**40
    ends = time.monotonic() + 60 * (arguments.minutes or 0)
    failed = False
    while True:
        for name in arguments.target or TARGETS:
            figures = run(name, seed, arguments.inputs)
            failed |= not {*figures} <= {"value", "sentence"}
            print(f"{name}: {json.dumps(figures)} from seed {seed}", flush=True)
            if arguments.minutes and time.monotonic() > ends:
                return int(failed)
        seed += arguments.inputs
        if time.monotonic() > ends:
            return int(failed)


if __name__ == "__main__":
    sys.exit(main())

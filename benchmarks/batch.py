"""Rows in one job beside one call after another: how many times the speed, and how many texts are the same.

    python -m benchmarks.batch BUNDLE [--threads 2] [--rounds 2]

Rows of their own, drawn at temperature 0.7, and greedy rows that begin alike, in each round.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from pastkey.runtime import Generator
from pastkey.runtime.bulk.rows import seed_of

from .speculation import STORY

WORDS = STORY.split()
OWN = [" ".join(WORDS[2 * place : 2 * place + 12]) for place in range(32)]
ALIKE = [f"{STORY} {STORY} The {name}" for name in WORDS[:16]]


def compare(name: str, generator: Generator, prompts: list[str], options: dict[str, Any]) -> None:
    """Prints how many times as fast the rows are together."""
    model, ids = generator.model, list(range(len(prompts)))
    started = time.perf_counter()
    alone = [
        model.generate(prompt, seed=seed_of(0, number), **options).text
        for number, prompt in zip(ids, prompts, strict=True)
    ]
    between = time.perf_counter()
    made = generator({"id": ids, "prompt": prompts, **{key: [value] * len(ids) for key, value in options.items()}})
    ended = time.perf_counter()
    same = sum(one == other for one, other in zip(alone, made["text"], strict=True))
    ratio = (between - started) / (ended - between)
    print(f"{len(ids)} rows {name}: {ratio:.1f} times as fast, {same} texts the same", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    generator = Generator(arguments.bundle, threads=arguments.threads)
    for _ in range(arguments.rounds):
        compare("of their own", generator, OWN, {"max_new_tokens": 32, "temperature": 0.7})
        compare("that begin alike", generator, ALIKE, {"max_new_tokens": 8})


if __name__ == "__main__":
    main()

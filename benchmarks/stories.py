"""The share of generated stories that the story grammar accepts, per bundle.

    python -m benchmarks.stories demo/fp32 demo/int8 [--count 100] [--temperature 0.7] [--json]

The grammar that made the training text also parses: it knows whether the lost thing is the found thing and whether
"she" is the one who was named. All bundles draw with the same seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator

from tqdm import tqdm

import pastkey
from pastkey.train.stories import check_story


def main() -> int:
    parser = argparse.ArgumentParser(description="Share of generated stories that the grammar accepts.")
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--count", type=int, default=100, help="stories per bundle (default 100)")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a line per bundle")
    arguments = parser.parse_args()
    shares = {}
    for bundle in arguments.bundles:
        reasons: Counter[str] = Counter()
        stories = tell(bundle, arguments.count, arguments.temperature)
        for story in tqdm(stories, total=arguments.count, desc=bundle, unit="story", disable=not sys.stderr.isatty()):
            verdict = check_story(story)
            reasons["" if verdict.ok else verdict.reason] += 1
        shares[bundle] = reasons.pop("", 0) / arguments.count
        if not arguments.json:
            print(f"{bundle}: the grammar accepts {shares[bundle]:.0%} of {arguments.count} generated stories")
    if arguments.json:
        print(json.dumps(shares))
    return 0


def tell(bundle: str, count: int, temperature: float) -> Iterator[str]:
    """`count` stories from an empty prompt, seeds 0, 1, 2, ..."""
    lm = pastkey.load(bundle)
    for seed in range(count):
        yield lm.generate("", max_new_tokens=256, temperature=temperature, seed=seed).text


if __name__ == "__main__":
    sys.exit(main())

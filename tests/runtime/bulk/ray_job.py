"""Answers rows on a local Ray cluster of two actors, of which one is killed in the middle: run by test_ray.py.

python ray_job.py BUNDLE FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

import pastkey

ROWS = 64


class Mortal(pastkey.Generator):
    """Kills the process that it is in, once, before its second batch."""

    def __init__(self, bundle: str, folder: str, **options: Any) -> None:
        super().__init__(bundle, threads=1, **options)
        self.folder, self.batches = Path(folder), 0

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        self.batches += 1
        (self.folder / f"actor-{os.getpid()}").touch()
        if self.batches == 2:
            try:
                (self.folder / "killed").open("x").close()
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


def main(bundle: str, folder: str) -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    rows = [
        {
            "id": number,
            "prompt": "abcdefg"[: 1 + number % 7] if number % 10 else "",
            "temperature": 1.0,
            "topic": f"t{number}",
        }
        for number in range(ROWS)
    ]
    made = ray.data.from_items(rows).map_batches(
        Mortal,
        fn_constructor_kwargs={"bundle": bundle, "folder": folder, "max_new_tokens": 6},
        batch_size=4,
        concurrency=2,
    )
    answers = made.take_all()
    print(json.dumps(answers))
    whole = ray.data.from_items(rows).map_batches(pastkey.Generator(bundle, threads=1, max_new_tokens=6), batch_size=16)
    print(json.dumps(sorted(whole.take_all(), key=lambda row: row["id"])))


if __name__ == "__main__":
    main(*sys.argv[1:])

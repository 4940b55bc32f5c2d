"""Answers rows on a local Ray cluster of two actors, of which one is killed in the middle; then without actors.

python ray_rows.py BUNDLE FOLDER, run by test_ray.py: reads FOLDER/rows.json, writes FOLDER/actors.json, functions.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.data

import pastkey

OPTIONS: dict[str, Any] = {"threads": 1, "max_new_tokens": 6}


class Mortal(pastkey.Generator):
    """Of all its processes the first that comes to a second batch is killed then."""

    def __init__(self, bundle: str, folder: str) -> None:
        super().__init__(bundle, **OPTIONS)
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
    rows = json.loads(Path(folder, "rows.json").read_text())

    def write(name: str, made: Any) -> None:
        Path(folder, f"{name}.json").write_text(json.dumps(made.take_all()))

    arguments = {"bundle": bundle, "folder": folder}
    data = ray.data.from_items(rows)
    write("actors", data.map_batches(Mortal, fn_constructor_kwargs=arguments, batch_size=4, concurrency=2))
    write("functions", data.map_batches(pastkey.Generator(bundle, **OPTIONS), batch_size=16))


if __name__ == "__main__":
    main(*sys.argv[1:])

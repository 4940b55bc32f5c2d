"""Answers rows on a local Ray cluster of two actors, then without actors.

python ray_rows.py BUNDLE FOLDER, run by test_ray.py: reads FOLDER/rows.json, writes FOLDER/actors.json, functions.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray.data

import pastkey

OPTIONS: dict[str, Any] = {"threads": 1, "max_new_tokens": 6}


def main(bundle: str, folder: str) -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    rows = json.loads(Path(folder, "rows.json").read_text())

    def write(name: str, made: Any) -> None:
        Path(folder, f"{name}.json").write_text(json.dumps(made.take_all()))

    data, arguments = ray.data.from_items(rows), {"bundle": bundle, **OPTIONS}
    actors = {"fn_constructor_kwargs": arguments, "batch_size": 4, "concurrency": 2}
    write("actors", data.map_batches(pastkey.Generator, **actors))
    write("functions", data.map_batches(pastkey.Generator(bundle, **OPTIONS), batch_size=16))


if __name__ == "__main__":
    main(*sys.argv[1:])

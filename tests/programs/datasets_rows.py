"""Answers rows by Dataset.map, in this process and in two others.

python datasets_rows.py BUNDLE FOLDER, run by test_ray.py: reads FOLDER/rows.json, writes FOLDER/1.json, 2.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets

import pastkey

BUNDLE, FOLDER = sys.argv[1], Path(sys.argv[2])

if __name__ == "__main__":
    rows = datasets.Dataset.from_list(json.loads((FOLDER / "rows.json").read_text()))
    fingerprints = set()
    for processes in (1, 2):
        generator = pastkey.Generator(BUNDLE, threads=1, max_new_tokens=6)
        made = rows.map(generator, batched=True, batch_size=7, num_proc=None if processes == 1 else processes)
        (FOLDER / f"{processes}.json").write_text(json.dumps(list(made)))
        fingerprints.add(datasets.fingerprint.Hasher.hash(generator))  # by which answers are found again
    assert len(fingerprints) == 1

"""The families again under transformers 4.57, in the environment of the extra `optimum`, which asks for it."""

import os
import re
import subprocess

import pytest

from benchmarks.environments import ROOT, environment

from ...programs.environments import OPTIMUM

FILE = "tests/export/graft/test_families.py"
AT_LEAST = 100  # cases; 113 when this was written


@pytest.mark.matrix
def test_families_under_transformers_4():
    done = subprocess.run(
        [environment(*OPTIMUM), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", FILE],
        cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"ORT_DISABLE_TELEMETRY": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    counted = re.search(r"(\d+) passed", done.stdout)
    assert int(counted[1]) >= AT_LEAST, done.stdout[-8000:]

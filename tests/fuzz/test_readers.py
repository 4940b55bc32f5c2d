"""Every reader gives a value or a sentence on whatever bytes: so many inputs each, the same every time.

PASTKEY_FUZZ=20000 in the environment tries so many more of each. The last input stays in build/fuzz/TARGET, also where
it ended the process. An input that was a finding once is in regressions/TARGET/.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

from ..shared import ROOT
from .bundles import BUNDLES, TEXTS
from .reader import input_of, outcome, workplace
from .sources import CHECKPOINTS, SOURCES

REGRESSIONS = Path(__file__).parent / "regressions"
TARGETS = {**BUNDLES, **CHECKPOINTS, **SOURCES, **TEXTS}  # in each, every other file is valid, and every hash is right
MORE = int(os.environ.get("PASTKEY_FUZZ", 0))
FIRST, FURTHER = range(20), range(20, 70 + MORE)  # seeds: `make test` uses the first, and CI also the others
LAST = ROOT / "build" / "fuzz"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch):
    """The targets say so in the environment, which other tests have as well."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    workplace()


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_valid_is_read(name):
    assert outcome(TARGETS[name], TARGETS[name].valid()).kind == "value"


@pytest.mark.parametrize("seeds", [FIRST, pytest.param(FURTHER, marks=pytest.mark.slow)], ids=["first", "further"])
@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_give_a_value_or_a_sentence(name, seeds):
    for seed in seeds[:: 5 if name.startswith("onnx") else 1]:  # opening one runs its graph
        content = input_of(TARGETS[name], seed)
        if MORE:
            LAST.mkdir(parents=True, exist_ok=True)
            (LAST / name).write_bytes(content)
        found = outcome(TARGETS[name], content)
        assert found.kind != "traceback", f"seed {seed}: {found.told}"  # a busy machine is slow at times


@pytest.mark.parametrize("file", sorted(REGRESSIONS.glob("*/*")), ids=lambda file: f"{file.parent.name}-{file.name}")
def test_what_was_a_finding_is_none_any_more(file):
    found = outcome(TARGETS[file.parent.name], file.read_bytes())
    assert found.well, found.told

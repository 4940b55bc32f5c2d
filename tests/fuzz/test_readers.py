"""Every reader gives a value or a sentence on whatever bytes: a few hundred inputs each, the same every time.

`make fuzz MINUTES=n` runs others; an input that was a finding once stands in regressions/TARGET/.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies

pytest.importorskip("torch", reason="torch is not installed")

from .check import outcome
from .targets import TARGETS, workplace

REGRESSIONS = Path(__file__).parent / "regressions"
EXAMPLES, NATIVE_EXAMPLES = 200, 40  # those of other people's libraries take longer

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets say so in the environment, which other tests have as well."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    workplace()


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_valid_is_read(name: str) -> None:
    assert outcome(TARGETS[name], TARGETS[name].valid()).kind == "value"


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_give_a_value_or_a_sentence(name: str) -> None:
    target = TARGETS[name]
    valid = target.valid()

    @hypothesis.settings(
        max_examples=NATIVE_EXAMPLES if target.native else EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategies.randoms(use_true_random=False))
    def check(rng: random.Random) -> None:
        found = outcome(target, target.mutate(rng, valid))
        assert found.kind != "traceback", found.told  # a busy machine is slow at times

    check()


@pytest.mark.parametrize("file", sorted(REGRESSIONS.glob("*/*")), ids=lambda file: f"{file.parent.name}-{file.name}")
def test_what_was_a_finding_is_none_any_more(file: Path) -> None:
    found = outcome(TARGETS[file.parent.name], file.read_bytes())
    assert found.well, found.told


def test_the_regressions_are_small() -> None:
    assert sum(file.stat().st_size for file in REGRESSIONS.glob("*/*")) <= 500_000

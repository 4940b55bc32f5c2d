"""A plugin of pytest, which `python -m tools.mutants` copies into the tree that it changes: pastkey.mutants_plugin.

MUTANT_HITS: the file to which each mark appends its mutant and the running test, and each test its time.
MUTANT_TESTS, MUTANT_BEGAN: a JSON file {test: its usual seconds} in the order to run, and when the first began.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# Seconds of a mutant's tests, before which no further one begins; and of one test, as a multiple of its usual time.
LIMIT, SLOWER, PATIENCE = 240, 10, 60
_seen: set[tuple[int, str]] = set()


def hit(mutant: int) -> None:
    """Writes that the running test passes the line of a mutant; a fixture's mark counts for all tests of its file."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "")
    if (mutant, test) in _seen or "MUTANT_HITS" not in os.environ:
        return
    _seen.add((mutant, test))
    name, _, phase = test.rpartition(" ")
    try:
        with Path(os.environ["MUTANT_HITS"]).open("a") as file:
            file.write(f"{mutant}\t{name.partition('::')[0] if phase == '(setup)' else name}\n")
    except OSError:
        pass  # in a child that may write nothing


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes the time of each test."""
    if "MUTANT_HITS" in os.environ and report.when == "call" and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(os.environ["MUTANT_HITS"]).open("a") as file:
            file.write(f"seconds\t{report.nodeid}\t{report.duration:.3f}\t{report.outcome}\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that pass the line first, each by its time."""
    if "MUTANT_TESTS" in os.environ:
        order = {name: number for number, name in enumerate(json.loads(Path(os.environ["MUTANT_TESTS"]).read_text()))}
        items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Fails a test that runs far longer than usual, as in a loop without an end; begins none after the limit."""
    if "MUTANT_TESTS" not in os.environ:
        return (yield)
    order = json.loads(Path(os.environ["MUTANT_TESTS"]).read_text())
    if time.monotonic() - float(os.environ["MUTANT_BEGAN"]) > LIMIT:
        pytest.exit("limit", returncode=0)

    def late(*_: object) -> None:
        pytest.fail("takes too long")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(int(PATIENCE + SLOWER * order[item.nodeid]))
    try:
        return (yield)
    finally:
        signal.alarm(0)

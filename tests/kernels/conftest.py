"""Where the library is not built, the reason to skip; emulated levels are for `make matrix`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from .running import ARM_LEVELS, LEVELS, ON_ARM, run_at

BUILT = importlib.util.find_spec("pastkey_kernels") is not None
each_level = pytest.mark.parametrize("level", LEVELS)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        level = item.callspec.params.get("level") if hasattr(item, "callspec") else None
        if level in ARM_LEVELS and not ON_ARM:
            item.add_marker(pytest.mark.matrix)
        if not BUILT and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="the native kernels are not installed: pip install ./kernels"))


@pytest.fixture(scope="session", autouse=True)
def short(short_exports):
    """Exports of these tests are short."""


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """run(LEVEL, {KEY: CASE}): the outcome of each case. Skips where this machine does not have the level."""
    missing = set[str]()

    def run_cases(level, cases):
        found = None if level in missing else run_at(level, list(cases.values()), tmp_path_factory.mktemp(level))
        if found is None:
            missing.add(level)
            pytest.skip(f"this machine has no {level}")
        return dict(zip(cases, found, strict=True))

    return run_cases

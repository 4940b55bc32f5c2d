"""Where the library is not built, the reason to skip; emulated levels are for `make matrix`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from .running import ARM_LEVELS, ON_ARM

BUILT = importlib.util.find_spec("pastkey_kernels") is not None


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        level = item.callspec.params.get("level") if hasattr(item, "callspec") else None
        if level in ARM_LEVELS and not ON_ARM:
            item.add_marker(pytest.mark.matrix)
    if not BUILT:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="the native kernels are not installed: pip install ./kernels"))


@pytest.fixture(scope="session", autouse=True)
def short(short_exports):
    """Exports of these tests are short."""

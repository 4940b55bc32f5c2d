"""The levels of this machine, and where the library is not built, the reason to skip."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

BUILT = importlib.util.find_spec("pastkey_kernels") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not BUILT:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="the native kernels are not installed: pip install ./kernels"))

"""Memory is asked for before it is taken."""

from __future__ import annotations

import pytest

from pastkey import memory
from pastkey.errors import ResourceError


def test_more_than_is_available_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    memory.require_memory_for("a.bin", 1000)
    with pytest.raises(ResourceError, match=r"reading a\.bin takes about 2\.0 GB of memory and 0 MB are available"):
        memory.require_memory_for("a.bin", 2 * 10**9)
    monkeypatch.setattr(memory, "available_memory", lambda: None)  # a system that does not say
    memory.require_memory_for("a.bin", 1 << 60)


def test_the_system_says_how_much_is_left() -> None:
    found = memory.available_memory()
    assert found is None or 0 < found < 1 << 50

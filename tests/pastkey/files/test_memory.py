"""Memory is asked for before it is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from pastkey.errors import ResourceError
from pastkey.files import memory


def test_more_than_is_available_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    memory.require_memory_for("a.bin", 1000)
    with pytest.raises(ResourceError, match=r"reading a\.bin takes about 2\.0 GB of memory and 0 MB are available"):
        memory.require_memory_for("a.bin", 2 * 10**9)
    monkeypatch.setattr(memory, "available_memory", lambda: None)  # a system that does not say
    memory.require_memory_for("a.bin", 1 << 60)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the system does not say")
def test_available_memory_is_less_than_the_machine_has():
    (total,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    found = memory.available_memory()
    assert found is not None
    assert 0 < found <= int(total.split()[1]) << 10

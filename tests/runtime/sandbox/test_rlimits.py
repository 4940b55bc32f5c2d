from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pastkey.runtime.sandbox import rlimits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems keep no such limit")


def ran(program: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"from pastkey.runtime.sandbox import rlimits\n{program}", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_memory_ends_where_it_was_said():
    """What is allocated counts; a file that is mapped does not."""
    program = """
import mmap, sys
assert rlimits.limit_memory(100_000_000, 600_000_000, final=True)
kept = bytearray(60_000_000)
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
try:
    bytearray(60_000_000)
except MemoryError:
    print("no memory", len(mapped))
"""
    sparse = Path(sys.executable)
    assert ran(program, sparse) == f"no memory {sparse.stat().st_size}"


def test_shared_memory_ends_too():
    program = """
import mmap
assert rlimits.limit_memory(100_000_000, 0, final=True)
try:
    for _ in range(100): globals().setdefault("kept", []).append(mmap.mmap(-1, 500_000_000))
except OSError:
    print("no memory")
"""
    assert ran(program) == "no memory"


def test_a_first_limit_may_be_raised_and_a_final_one_not():
    program = """
import resource
rlimits.limit_memory(50_000_000, 0, final=False)
rlimits.limit_memory(100_000_000, 0, final=False)
rlimits.limit_memory(50_000_000, 0, final=True)
soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
rlimits.limit_memory(900_000_000, 0, final=True)
print(soft == hard, resource.getrlimit(resource.RLIMIT_DATA)[1] == hard)
"""
    assert ran(program) == "True True"


def test_files(tmp_path):
    program = """
import os, sys
assert rlimits.limit_files(1000)
file = open(sys.argv[1], "wb", buffering=0)
print(file.write(bytes(5000)))
try:
    file.write(b"x")
except OSError as error:
    print(error.strerror)
kept = []
try:
    while True: kept.append(os.open(os.devnull, os.O_RDONLY))
except OSError as error:
    print(error.strerror, len(kept) < rlimits.DESCRIPTORS)
"""
    assert ran(program, tmp_path / "f").split("\n") == ["1000", "File too large", "Too many open files True"]


def test_without_the_module_of_limits(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert not rlimits.limit_files(0)
    monkeypatch.setattr(rlimits.sys, "platform", "darwin")
    assert not rlimits.limit_memory(1, 1, final=True)


def test_size_of_what_is_on_the_disk(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1000))
    (tmp_path / "b").mkdir()
    with (tmp_path / "b" / "sparse").open("wb") as file:
        file.truncate(10**12)
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    assert 1000 <= rlimits.size_of(tmp_path) < 100_000
    assert rlimits.size_of(tmp_path / "a") == 1000
    assert rlimits.size_of(tmp_path / "nothing") == 0

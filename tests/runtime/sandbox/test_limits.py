"""The limits that a process puts on itself: of landlock, and of the system's resources."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pastkey.errors import InputError
from pastkey.runtime.sandbox import landlock, rlimits
from pastkey.runtime.sandbox.limits import LEAST_MEMORY, MEMORY, Limits, LimitsInForce, default_memory


def ran(program, *arguments):
    imports = "import os, sys\nfrom pastkey.runtime.sandbox import rlimits"
    command = [sys.executable, "-c", f"{imports}\n{program}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout.strip()


# --- what is asked for --------------------------------------------------------------------------------------------
def test_what_may_be_asked_for():
    assert Limits() == Limits(None, 120.0)
    for memory in (True, LEAST_MEMORY - 1, 1e9, "4 GB"):
        with pytest.raises(InputError, match=f"bytes from {LEAST_MEMORY} were expected"):
            Limits(memory=memory)
    for seconds in (0, -1, float("inf"), float("nan"), None, True):
        with pytest.raises(InputError, match="a number above 0 and at most 1000000 was expected"):
            Limits(seconds=seconds)


def test_in_words():
    assert str(LimitsInForce(5.0, 2_400_000_000, 7)) == (
        "limits in force: 5 s for an answer, 2.4 GB of memory, no files but its own and the libraries (landlock ABI 7)"
    )
    assert str(LimitsInForce(0.5, None, 0, ("its memory is not bounded", "no landlock"))) == (
        "limits in force: 0.5 s for an answer; not in force on this system: its memory is not bounded, no landlock"
    )


@pytest.mark.parametrize(
    ("available", "expected"), [(None, MEMORY + 300), (10**12, MEMORY + 300), (10**9, 10**9), (5, LEAST_MEMORY)]
)
def test_the_default_goes_by_the_files_and_what_is_available(available, expected):
    assert default_memory(100, available) == expected


# --- landlock -----------------------------------------------------------------------------------------------------
def test_rights_by_abi():
    """Of each ABI what the kernel's documentation says that it can deny."""
    files, networks, scopes = zip(*map(landlock.handled, range(1, 8)), strict=True)
    assert [rights.bit_length() for rights in files] == [13, 14, 15, 15, 16, 16, 16]
    assert (networks, scopes) == ((0, 0, 0, 3, 3, 3, 3), (0, 0, 0, 0, 0, 3, 3))
    assert [landlock.denies_tcp(version) for version in (0, 3, 4, 7)] == [False, False, True, True]


def test_system_calls_and_structures(tmp_path, monkeypatch):
    """By the numbers of include/uapi/asm-generic/unistd.h, and the layouts of include/uapi/linux/landlock.h."""
    called, closed, order = [], [], sys.byteorder

    def record(number, *arguments):
        called.append((number, *(getattr(argument, "value", argument) for argument in arguments)))
        return {444: 4 if len(called) == 1 else 77}.get(number, 0)

    monkeypatch.setattr(landlock, "_syscall", record)
    monkeypatch.setattr(landlock, "no_new_privileges", lambda: None)
    monkeypatch.setattr(landlock.os, "close", closed.append)
    monkeypatch.setattr(landlock.sys, "platform", "linux")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(landlock.os, "open", lambda path, flags: 9)
    assert landlock.restrict([(tmp_path, landlock.WRITE), (tmp_path / "file", landlock.READ)]) == 4
    (_, *version), (_, *ruleset), folder, file, (_, *restricted) = called
    assert [number for number, *_ in called] == [444, 444, 445, 445, 446]
    assert (version, restricted, closed) == ([None, 0, 1], [77, 0], [9, 9, 77])
    assert ruleset == [(0x7FFF).to_bytes(8, order) + (3).to_bytes(8, order) + bytes(8), 24, 0]
    assert folder[1:4] == (77, 1, (0x41BE).to_bytes(8, order) + (9).to_bytes(4, order))
    assert file[3] == (0x4).to_bytes(8, order) + (9).to_bytes(4, order)  # no folder to list


def test_without_landlock_nothing_is_denied_and_it_is_said(monkeypatch):
    monkeypatch.setattr(landlock, "_syscall", lambda number, *_: -1)
    assert landlock.abi() == 0
    assert landlock.restrict([]) == 0
    monkeypatch.setattr(landlock.sys, "platform", "darwin")
    monkeypatch.setattr(landlock, "_syscall", lambda number, *_: 7)
    assert landlock.abi() == 0


@pytest.mark.skipif(not landlock.abi(), reason="this kernel has no landlock, or a container denies it")
def test_what_the_kernel_refuses_is_an_error(monkeypatch):
    real = landlock._syscall
    monkeypatch.setattr(landlock, "_syscall", lambda number, *a: real(number, *a) if number == 444 else real(445, 0))
    with pytest.raises(OSError, match="landlock: "):
        landlock._checked(landlock.ADD_RULE)


# --- resources ----------------------------------------------------------------------------------------------------
RESOURCES = {
    "what is allocated counts, a file that is mapped does not": """
import mmap
assert rlimits.limit_memory(100_000_000, 600_000_000, final=True)
kept = bytearray(60_000_000)
with open(sys.executable, "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
try:
    bytearray(60_000_000)
except MemoryError:
    print("no memory")
""",
    "shared memory ends too": """
import mmap
assert rlimits.limit_memory(100_000_000, 0, final=True)
try:
    for _ in range(100): globals().setdefault("kept", []).append(mmap.mmap(-1, 500_000_000))
except OSError:
    print("no memory")
""",
    "a first limit may be raised and a final one not": """
import resource
rlimits.limit_memory(50_000_000, 0, final=False)
rlimits.limit_memory(100_000_000, 0, final=False)
rlimits.limit_memory(50_000_000, 0, final=True)
soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
rlimits.limit_memory(900_000_000, 0, final=True)
if soft == hard == resource.getrlimit(resource.RLIMIT_DATA)[1]:
    print("no memory")
""",
}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep no such limit")
@pytest.mark.parametrize("name", RESOURCES)
def test_memory_ends_where_it_was_said(name):
    assert ran(RESOURCES[name]) == "no memory"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep no such limit")
def test_files_end_where_it_was_said(tmp_path):
    program = """
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

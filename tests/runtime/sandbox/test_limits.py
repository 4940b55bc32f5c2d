"""The limits that a process puts on itself: of landlock, and of the system's resources."""

import subprocess
import sys

import pytest

from pastkey.errors import InputError
from pastkey.runtime.sandbox import landlock, rlimits
from pastkey.runtime.sandbox.limits import LEAST_MEMORY, MEMORY, Limits, LimitsInForce, default_memory

# --- what is asked for --------------------------------------------------------------------------------------------
MEMORIES = [{"memory": memory} for memory in (True, LEAST_MEMORY - 1, 1e9, "4 GB")]
TIMES = [{"seconds": seconds} for seconds in (0, -1, float("inf"), float("nan"), None, True)]


@pytest.mark.parametrize("given", [*MEMORIES, *TIMES])
def test_what_may_be_asked_for(given):
    assert Limits() == Limits(None, 120.0)
    memory, seconds = f"bytes from {LEAST_MEMORY} were expected", "a number above 0 and at most 1000000 was expected"
    with pytest.raises(InputError, match=memory if "memory" in given else seconds):
        Limits(**given)


def test_in_words():
    told = "5 s for an answer, 2.4 GB of memory, no files but its own and the libraries (landlock ABI 7)"
    assert str(LimitsInForce(5.0, 2_400_000_000, 7)) == f"limits in force: {told}"
    told = "0.5 s for an answer; not in force on this system: its memory, no landlock"
    assert str(LimitsInForce(0.5, None, 0, ("its memory", "no landlock"))) == f"limits in force: {told}"


def test_the_default_goes_by_the_files_and_what_is_available():
    found = [default_memory(100, available) for available in (None, 10**12, 10**9, 5)]
    assert found == [MEMORY + 300, MEMORY + 300, 10**9, LEAST_MEMORY]


# --- landlock -----------------------------------------------------------------------------------------------------
def test_rights_by_abi():
    """Of each ABI what the kernel's documentation says that it can deny."""
    files, networks, scopes = zip(*map(landlock.handled, range(1, 8)), strict=True)
    assert [rights.bit_length() for rights in files] == [13, 14, 15, 15, 16, 16, 16]
    assert (networks, scopes) == ((0, 0, 0, 3, 3, 3, 3), (0, 0, 0, 0, 0, 3, 3))
    assert [landlock.denies_tcp(version) for version in (0, 3, 4, 7)] == [False, False, True, True]


def test_system_calls_and_structures(tmp_path, monkeypatch):
    """By the numbers of include/uapi/asm-generic/unistd.h, and the layouts of include/uapi/linux/landlock.h."""
    called, closed, order = list[tuple[object, ...]](), list[int](), sys.byteorder

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
LIMITED = """
import mmap, os, resource, sys
from pastkey.runtime.sandbox import rlimits

def tried(action):
    try: return action()
    except (MemoryError, OSError) as error: return getattr(error, "strerror", None) or type(error).__name__

def limit():
    return resource.getrlimit(resource.RLIMIT_DATA)

rlimits.limit_memory(50_000_000, 0, final=False)
assert rlimits.limit_memory(100_000_000, 600_000_000, final=True)
soft, hard = limit()
rlimits.limit_memory(900_000_000, 0, final=True)
print(soft == hard == limit()[1])
kept = [bytearray(60_000_000)]
with open(sys.executable, "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
print(tried(lambda: bytearray(60_000_000)))
print(tried(lambda: [mmap.mmap(-1, 500_000_000) for _ in range(100)]))
assert rlimits.limit_files(1000)
file = open(sys.argv[1], "wb", buffering=0)
print(file.write(bytes(5000)), tried(lambda: file.write(b"x")), sep="\\n")
print(tried(lambda: [kept.append(os.open(os.devnull, os.O_RDONLY)) for _ in range(rlimits.DESCRIPTORS)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep no such limit")
def test_memory_and_files_end_where_it_was_said(tmp_path):
    """A first limit may be raised and a final one not. Allocated memory counts, and not a file that is mapped."""
    command = [sys.executable, "-c", LIMITED, tmp_path / "file"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    memory, files = ["True", "MemoryError", "Cannot allocate memory"], ["1000", "File too large", "Too many open files"]
    assert done.stdout.splitlines() == memory + files


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

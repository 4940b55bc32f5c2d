from __future__ import annotations

import subprocess
import sys

import pytest

from pastkey.runtime.sandbox import landlock

PROGRAM = """
import json, os, socket, sys
from pathlib import Path
from pastkey.runtime.sandbox import landlock
allowed, outside, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
rights = [(allowed, landlock.READ), (Path(sys.executable), landlock.READ), (Path("/nowhere"), landlock.READ)]
kept = socket.socket()
abi = landlock.restrict(rights)
def tried(action):
    try:
        action()
    except OSError as error:
        return type(error).__name__
    return "done"
print(json.dumps({
    "abi": abi,
    "read": tried(lambda: (allowed / "file").read_bytes()),
    "list": tried(lambda: os.listdir(allowed)),
    "write": tried(lambda: (allowed / "file").write_bytes(b"")),
    "make": tried(lambda: (allowed / "other").write_bytes(b"")),
    "outside": tried(outside.read_bytes),
    "list outside": tried(lambda: os.listdir(outside.parent)),
    "execute": tried(lambda: os.execv(sys.executable, [sys.executable, "-c", ""])),
    "connect": tried(lambda: kept.connect(("127.0.0.1", port))),
    "status": [line for line in Path("/proc/self/status").open() if "NoNewPrivs" in line] if not abi else "",
}))
"""


@pytest.mark.skipif(not landlock.abi(), reason="this kernel has no landlock, or a container denies it")
def test_a_process_opens_what_it_was_allowed_and_nothing_else(tmp_path):
    import socket

    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (allowed / "file").write_bytes(b"x")
    (tmp_path / "outside").write_bytes(b"secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        arguments = [str(allowed), str(tmp_path / "outside"), str(server.getsockname()[1])]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments],
            capture_output=True,
            text=True,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    import json

    found = json.loads(done.stdout)
    assert found.pop("abi") == landlock.abi()
    found.pop("status")
    denied = {name for name, outcome in found.items() if outcome == "PermissionError"}
    expected = {"write", "make", "outside", "list outside", "execute"}
    assert denied == expected | ({"connect"} if landlock.denies_tcp(landlock.abi()) else set())
    assert {found["read"], found["list"]} == {"done"}


def test_rights_by_abi():
    """Of each ABI what the kernel's documentation says that it can deny."""
    assert [landlock.handled(version)[0].bit_length() for version in range(1, 8)] == [13, 14, 15, 15, 16, 16, 16]
    assert [landlock.handled(version)[1] for version in range(1, 8)] == [0, 0, 0, 3, 3, 3, 3]
    assert [landlock.handled(version)[2] for version in range(1, 8)] == [0, 0, 0, 0, 0, 3, 3]
    assert [landlock.denies_tcp(version) for version in (0, 3, 4, 7)] == [False, False, True, True]


def test_system_calls_and_structures(tmp_path, monkeypatch):
    """By the numbers of include/uapi/asm-generic/unistd.h, and the layouts of include/uapi/linux/landlock.h."""
    called: list[tuple[int, tuple[object, ...]]] = []

    def record(number: int, *arguments: object) -> int:
        called.append((number, tuple(getattr(argument, "value", argument) for argument in arguments)))
        return {444: 4 if len(called) == 1 else 77}.get(number, 0)

    monkeypatch.setattr(landlock, "_syscall", record)
    monkeypatch.setattr(landlock, "no_new_privileges", lambda: None)
    closed: list[int] = []
    monkeypatch.setattr(landlock.os, "close", closed.append)
    monkeypatch.setattr(landlock.sys, "platform", "linux")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(landlock.os, "open", lambda path, flags: 9)
    assert landlock.restrict([(tmp_path, landlock.WRITE), (tmp_path / "file", landlock.READ)]) == 4
    assert [number for number, _ in called] == [444, 444, 445, 445, 446]
    assert called[0][1] == (None, 0, 1)
    attributes = called[1][1][0]
    assert attributes == (0x7FFF).to_bytes(8, sys.byteorder) + (3).to_bytes(8, sys.byteorder) + bytes(8)
    assert called[1][1][1:] == (24, 0)
    folder, file = called[2][1], called[3][1]
    assert folder[:2] == (77, 1)
    assert folder[2] == (0x41BE).to_bytes(8, sys.byteorder) + (9).to_bytes(4, sys.byteorder)
    assert file[2] == (0x4).to_bytes(8, sys.byteorder) + (9).to_bytes(4, sys.byteorder)  # no folder to list
    assert called[4][1] == (77, 0)
    assert closed == [9, 9, 77]


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

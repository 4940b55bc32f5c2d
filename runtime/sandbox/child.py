"""The process of an untrusted bundle: it puts limits on itself, opens the bundle, and answers.

Landlock binds the thread that asks for it and those that it starts later, so that all of this comes before numpy or
onnxruntime is imported: what stands at the top of this file imports neither.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pastkey.contract.names import MANIFEST
from pastkey.files.folder import hub_files
from pastkey.files.memory import available_memory

from ..model.unpack import unpack
from . import landlock, rlimits
from .frames import failure_of, message, read_frame, write_frame
from .limits import Limits, LimitsInForce, default_memory

_SCRATCH: Final = 200_000_000  # bytes of a file that may be written
_BESIDE: Final = 1_000_000_000  # bytes that imports may take
# What libraries read: themselves, the kind of CPU, the memory that is left, the time zone.
_SYSTEM: Final = (
    "/usr", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/etc/localtime", "/proc/self", "/proc/cpuinfo",
    "/proc/meminfo", "/sys/devices/system", "/sys/fs/cgroup", "/dev/urandom", "/dev/random", "/dev/null",
)  # fmt: skip


def main(lifeline: int) -> None:
    """Answers until the questions end.

    Args:
        lifeline: A descriptor that is closed with the parent's last breath, or 0.
    """
    _end_with_parent(lifeline)
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)  # a library may print
    asked = read_frame(source, json.loads, lambda: sys.maxsize)
    if asked is None:
        return
    number = asked["id"]
    try:
        in_force, path = limited(asked["given"])
        from .server import Server

        server = Server(path, source, target)
        rlimits.limit_memory(in_force.memory or 0, _size_of(path), final=True)
        write_frame(target, message({"id": number, "value": vars(in_force)}))
    except BaseException as error:
        write_frame(target, message({"id": number, "failure": failure_of(error)}, ascii_only=True))
        return
    server.serve()


def _end_with_parent(lifeline: int) -> None:
    """Has the system end this process by SIGIO as soon as the parent is gone, whatever it does then.

    Its main thread may be in native code and not see the end of the input. PR_SET_PDEATHSIG would also act when only
    the parent's thread ended.
    """
    if not lifeline or not hasattr(os, "O_ASYNC"):
        return
    import fcntl

    with contextlib.suppress(OSError):  # a system that has it for terminals alone
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


def limited(given: Mapping[str, Any]) -> tuple[LimitsInForce, Path]:
    """Puts the limits on this process, all but the final one of memory, and unpacks a zip file under them.

    Returns what is in force, and where the bundle is. `given`: what the parent asks for.
    """
    limits = Limits(given["memory"], given["seconds"])
    path = Path(given["path"])
    scratch = None if given["scratch"] is None else Path(given["scratch"])
    rights = [(Path(place), _RIGHTS[kind]) for place, kind in given["libraries"]]
    rights += [(Path(place), landlock.READ) for place in (*_SYSTEM, *_of_python())]
    rights += [(Path(os.devnull), landlock.READ_FILE | landlock.WRITE_FILE)]
    if given["unpack_to"] is not None:
        path = _unpacked(path, given["name"], Path(given["unpack_to"]), rights)
    rights.append((path, landlock.READ))
    rights += [(file, landlock.READ) for file in hub_files(path)]
    if scratch is not None:
        rights.append((scratch, landlock.WRITE))
        tempfile.tempdir = str(scratch)
    missing = []
    abi = landlock.restrict(rights)
    if not abi:
        missing.append("files and networks are open to it (no landlock)")
    elif not landlock.denies_tcp(abi):
        missing.append("the network is open to it (landlock denies TCP from ABI 4 on)")
    if not rlimits.limit_files(0 if scratch is None else _SCRATCH):
        missing.append("the number and size of its files is not bounded")
    memory = limits.memory or default_memory(_size_of(path), available_memory())
    if not rlimits.limit_memory(memory + _BESIDE, _size_of(path), final=False):
        memory = 0
        missing.append("its memory is not bounded")
    return LimitsInForce(limits.seconds, memory or None, abi, tuple(missing)), path


def _size_of(bundle: Path) -> int:
    """Bytes of its files; 0 for a folder that is none, which may hold a whole disk."""
    return rlimits.size_of(bundle) if (bundle / MANIFEST).is_file() else 0


_RIGHTS: Final = {"read": landlock.READ, "list": landlock.READ_DIR}


def _of_python() -> list[str]:
    """Where the interpreter's own library lies."""
    return [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), str(Path(sys.base_prefix) / "lib")]


def _unpacked(file: Path, name: str, folder: Path, rights: list[tuple[Path, int]]) -> Path:
    """Unpacks a zip file, with the right to write to this folder and no other."""
    landlock.restrict([*rights, (file, landlock.READ_FILE), (folder, landlock.WRITE)])
    rlimits.limit_memory(_BESIDE, _BESIDE, final=False)
    with file.open("rb") as content:
        unpack(content, name, folder)
    return folder

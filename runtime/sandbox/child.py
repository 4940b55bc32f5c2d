"""The process of an untrusted bundle: it puts limits on itself, and runs one function, which opens the bundle.

Landlock binds the thread that asks for it and those that it starts later, so that all of this comes before numpy or
onnxruntime is imported: the top of this file imports neither.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import importlib
import io
import json
import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

from pastkey import command
from pastkey.__main__ import guarded
from pastkey.contract.names import MANIFEST
from pastkey.errors import IntegrityError, PastkeyError, UntrustedBundleError, first_line, missing_extra
from pastkey.files.folder import hub_files
from pastkey.files.memory import available_memory

from ..model.unpack import tell_as_given, unpack
from . import landlock, rlimits
from .frames import ERROR, LIMITS, LINE, LONGEST, OUT, PROGRESS, FrameWriter
from .limits import Limits, LimitsInForce, default_memory

# Words of an error after memory has run out.
_NO_MEMORY: Final = ("bad_alloc", "bad allocation", "allocate memory", "out of memory", "can't start new thread")
_BESIDE: Final = 1_000_000_000  # bytes that imports may use
# Files that libraries read: themselves, the kind of CPU, the memory that is left, the time zone.
_SYSTEM: Final = (
    "/usr", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/etc/localtime", "/proc/self", "/proc/cpuinfo",
    "/proc/meminfo", "/sys/devices/system", "/sys/fs/cgroup", "/dev/urandom", "/dev/random", "/dev/null",
)  # fmt: skip


def main(lifeline: int) -> None:
    """Reads its job from standard input, puts the limits on itself, and runs the job's function.

    Args:
        lifeline: A descriptor that is closed with the parent's last breath, or 0.
    """
    _end_with_parent(lifeline)
    source, frames = os.fdopen(os.dup(0), "rb"), FrameWriter(os.fdopen(os.dup(1), "wb"))
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)  # a library may print
    job = json.loads(source.readline())
    typed, shown = job["terminals"]
    sys.stdin = io.TextIOWrapper(io.BufferedReader(_Input(source, frames, typed)), encoding="utf-8")
    sys.stdout, sys.stderr = (  # JSON may hold half of a surrogate pair
        io.TextIOWrapper(
            io.BufferedWriter(_Output(kind, frames, shown)), "utf-8", "backslashreplace", line_buffering=shown
        )
        for kind in (OUT, ERROR)
    )
    builtins.input = _input
    command.on_progress = lambda: frames.write(PROGRESS)

    def work() -> int:
        in_force, path = limited(job)
        try:
            function = function_of(job["run"])
            rlimits.limit_memory(in_force.memory or 0, _size_of(path), final=True)
            frames.write(LIMITS, json.dumps(vars(in_force)).encode())
            return int(function(argparse.Namespace(**{**job["given"], "bundle": str(path)})))
        except Exception as error:
            tell_as_given(error, path, job["name"])
            if isinstance(error, ModuleNotFoundError):
                raise missing_extra(error, job["run"].split(".")[1]) from None
            if is_out_of_memory(error):
                raise UntrustedBundleError(
                    f"the process of the untrusted bundle {job['name']} has too little memory ({first_line(error)}); "
                    f"{in_force}: do not use it, or raise memory if you trust it"
                ) from None
            raise

    status = guarded(work, job["prog"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a library's threads may not end


def _input(prompt: object = "", /) -> str:
    """As `input`, which would lose a Ctrl-C that comes while it shows the prompt: it ignores errors of its flush."""
    print(prompt, end="", flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


class _Input(io.RawIOBase):
    """Lines that the parent sends, one when it is asked for."""

    def __init__(self, source: BinaryIO, frames: FrameWriter, terminal: bool) -> None:
        self._source, self._frames, self._terminal = source, frames, terminal
        self._is_whole = True  # the last line

    def readable(self) -> bool:
        """True."""
        return True

    def isatty(self) -> bool:
        """Whether the parent's input is a terminal."""
        return self._terminal

    def readinto(self, buffer: Any) -> int:
        """See RawIOBase."""
        if self._is_whole:
            self._frames.write(LINE)
        piece = self._source.read1(len(buffer))  # type: ignore[attr-defined]
        buffer[: len(piece)] = piece
        self._is_whole = piece.endswith(b"\n")
        return len(piece)


class _Output(io.RawIOBase):
    """The printed text, as frames."""

    def __init__(self, kind: bytes, frames: FrameWriter, terminal: bool) -> None:
        self._kind, self._frames, self._terminal = kind, frames, terminal

    def writable(self) -> bool:
        """True."""
        return True

    def isatty(self) -> bool:
        """Whether the parent's output is a terminal."""
        return self._terminal

    def write(self, content: Any) -> int:
        """See RawIOBase."""
        piece = bytes(content[:LONGEST])
        self._frames.write(self._kind, piece)
        return len(piece)


def function_of(name: str) -> Any:
    """The function of "module:name". The bundle's imports happen with it, since the bound of memory follows."""
    module, _, inner = name.partition(":")
    for needed in ("pastkey.runtime.loading", "pastkey.runtime.text.chat_format"):
        importlib.import_module(needed)
    return getattr(importlib.import_module(module), inner)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory has run out."""
    # Other sentences of pastkey quote the user's text.
    quotes = isinstance(error, PastkeyError) and not isinstance(error, IntegrityError)
    return isinstance(error, MemoryError) or (not quotes and any(sign in str(error) for sign in _NO_MEMORY))


def _end_with_parent(lifeline: int) -> None:
    """Has the system end this process by SIGIO as soon as the parent is gone, whatever it does then.

    Its main thread may be in native code and not see the end of the input. PR_SET_PDEATHSIG would also act when only
    the parent's thread ended.
    """
    if not lifeline or not hasattr(os, "O_ASYNC"):
        return
    import fcntl

    with contextlib.suppress(OSError):  # a system that has it for terminals only
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


def limited(given: Mapping[str, Any]) -> tuple[LimitsInForce, Path]:
    """Puts the limits on this process, all but the final one of memory, and unpacks a zip file under them.

    Returns the limits in force, and where the bundle is. `given`: the request of the parent.
    """
    limits = Limits(given["memory"], given["seconds"])
    path = Path(given["path"])
    rights = [(Path(place), _RIGHTS[kind]) for place, kind in given["libraries"]]
    rights += [(Path(place), landlock.READ) for place in (*_SYSTEM, *_of_python())]
    rights += [(Path(os.devnull), landlock.READ_FILE | landlock.WRITE_FILE)]
    if given["unpack_to"] is not None:
        path = _unpacked(path, given["name"], Path(given["unpack_to"]), rights)
    rights.append((path, landlock.READ))
    rights += [(file, landlock.READ) for file in hub_files(path)]
    missing = []
    abi = landlock.restrict(rights)
    if not abi:
        missing.append("files and networks are open to it (no landlock)")
    elif not landlock.denies_tcp(abi):
        missing.append("the network is open to it (landlock denies TCP from ABI 4 on)")
    if not rlimits.limit_files(0):
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
    """The folder of the interpreter's own library."""
    return [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), str(Path(sys.base_prefix) / "lib")]


def _unpacked(file: Path, name: str, folder: Path, rights: list[tuple[Path, int]]) -> Path:
    """Unpacks a zip file, with the right to write to this folder. No later layer of landlock widens `rights`."""
    landlock.restrict([*rights, (file, landlock.READ_FILE), (folder, landlock.WRITE)])
    rlimits.limit_memory(_BESIDE, _BESIDE, final=False)
    with file.open("rb") as content:
        return unpack(content, name, folder)

"""The limits that every Unix has by setrlimit, as far as its kernel keeps them. They are for the whole process."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Final

DESCRIPTORS: Final = 1024
_ADDRESSES: Final = 2_000_000_000  # bytes of further address space: stacks, reserved by malloc and not used


def limit_memory(most: int, mapped: int, *, final: bool) -> bool:
    """Bounds allocations from now on to `most` bytes. Returns whether the system keeps such a bound.

    Linux counts pages that are private and written to as data. Other memory, such as memory that is shared, is
    bounded by the address space, in which files of `mapped` bytes have room.

    Args:
        most: Bytes.
        mapped: Bytes of files.
        final: Whether no more can ever be allowed.
    """
    if sys.platform != "linux":
        return False
    import resource

    used = _kilobytes("VmData") << 10, _kilobytes("VmSize") << 10
    for kind, size in (
        (resource.RLIMIT_DATA, used[0] + most),
        (resource.RLIMIT_AS, used[1] + 2 * (most + mapped) + _ADDRESSES),
    ):
        _lower(kind, size, final)
    return True


def limit_files(largest: int) -> bool:
    """Bounds descriptors, the size of a file that is written, and lets no core be dumped. Returns whether it can."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return False
    _lower(resource.RLIMIT_CORE, 0, True)
    _lower(resource.RLIMIT_FSIZE, largest, True)
    _lower(resource.RLIMIT_NOFILE, DESCRIPTORS, True)
    return True


def size_of(path: Path) -> int:
    """Bytes on the disk of a file, or of all files in a folder: a sparse one has few."""
    found = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                found += _size(Path(folder) / name)
    if not found:
        with contextlib.suppress(OSError):
            found = _size(path)
    return found


def _size(file: Path) -> int:
    state = file.stat()
    return min(state.st_size, 512 * getattr(state, "st_blocks", 2**60))


def _lower(kind: int, size: int, final: bool) -> None:
    import resource

    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        size = min(size, hard)
    resource.setrlimit(kind, (size, size if final else hard))


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

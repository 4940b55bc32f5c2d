"""The available memory, checked before much of it is allocated."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

from ..errors import ResourceError

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt
_LARGE = 32 << 20  # bytes of an array from which on glibc always maps it, unless mappings are off


def available_memory() -> int | None:
    """Returns the bytes that this process can still allocate, None if unknown. Linux and its containers report them."""
    found = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            cached = next(
                int(line.split()[1])
                for line in (group / "memory.stat").read_text().splitlines()
                if line.startswith("inactive_file ")
            )
            found.append(int(limit) - int((group / "memory.current").read_text()) + cached)
    return min(found) if found else None


def require_memory_for(what: object, needed: int) -> None:
    """Raises ResourceError if `needed` bytes are not available: a sparse file can claim any size."""
    free = available_memory()
    if free is not None and needed > free:
        raise ResourceError(
            f"reading {what} needs about {shown_bytes(needed)} of memory and {shown_bytes(free)} are available: end "
            "other programs, or use a larger machine"
        )


def shown_bytes(size: int) -> str:
    """Formats a size for a sentence."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


@contextlib.contextmanager
def keeping_memory() -> Iterator[None]:
    """While open, freed memory stays with this process until `give_back_memory`, so that large arrays reuse pages.

    glibc gets large arrays from the system each time, which may be as slow as computing them.
    """
    _set_glibc(mapped=0, kept=2**31 - 1)
    try:
        yield
    finally:
        _set_glibc(mapped=65536, kept=2 * _LARGE)  # as glibc sets itself for arrays of that size
        give_back_memory()


def _set_glibc(mapped: int, kept: int) -> None:
    """Sets how many allocations are separate mappings, and the free bytes at the heap's end that are kept."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        for parameter, value in ((_MMAP_MAX, mapped), (_TRIM_THRESHOLD, kept), (_MMAP_THRESHOLD, _LARGE)):
            ctypes.CDLL(None).mallopt(parameter, value)


def give_back_memory() -> None:
    """Returns freed memory to the system: glibc keeps a third of an open graph's memory."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)

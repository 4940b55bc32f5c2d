"""Runs the work on matrices on all cores, with one thread each: threads that share small steps wait for one another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

_ROWS = 64  # of a matrix that one thread works on: they fit into a core's cache


def parts_of(rows: int) -> list[slice]:
    """Returns the parts of a matrix that one thread works on at once."""
    return [slice(start, start + _ROWS) for start in range(0, rows, _ROWS)]


@contextlib.contextmanager
def one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """Yields a pool of as many threads as torch uses. torch computes with one thread in each."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(before, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def for_each_part(work: Callable[[slice], None], rows: int) -> None:
    """Calls `work` on slices of all rows, on all cores. Raises its errors."""
    parts = parts_of(rows)
    if len(parts) <= 1:  # a pool costs more
        for part in parts:
            work(part)
        return
    with one_thread_each() as pool:
        for _ in pool.map(work, parts):
            pass

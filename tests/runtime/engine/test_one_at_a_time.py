"""The lock is held within a method, which may call another."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pastkey.runtime.engine.one_at_a_time import one_at_a_time


class Locked:
    def __init__(self) -> None:
        self.lock = threading.RLock()

    @one_at_a_time
    def outer(self) -> bool:
        return self.inner()

    @one_at_a_time
    def inner(self) -> bool:
        return free(self.lock)


def free(lock: Any) -> bool:
    """Whether another thread could enter."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lock.acquire, blocking=False).result()


def test_one_thread_is_inside_at_a_time():
    locked = Locked()
    assert not locked.outer()
    assert free(locked.lock)

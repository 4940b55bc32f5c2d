"""The lock is held within a method, which may call another."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from pastkey.runtime.engine.one_at_a_time import one_at_a_time


class Locked:
    def __init__(self) -> None:
        self.lock = threading.RLock()

    def free(self) -> bool:
        """Whether another thread could enter."""
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.lock.acquire, blocking=False).result()

    @one_at_a_time
    def outer(self) -> bool:
        return self.inner()

    @one_at_a_time
    def inner(self) -> bool:
        return self.free()


def test_one_thread_is_inside_at_a_time():
    locked = Locked()
    assert not locked.outer()
    assert locked.free()
    assert locked.outer.__name__ == "outer"

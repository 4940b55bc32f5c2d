"""A second thread waits while one is inside, and a method may call another."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from pastkey.runtime.engine.one_at_a_time import one_at_a_time


class Counter:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.inside = self.most = 0
        self.together = threading.Barrier(2)

    @one_at_a_time
    def enter(self) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.rest()
        self.inside -= 1

    @one_at_a_time
    def rest(self) -> None:
        threading.Event().wait(0.01)


def test_one_runs_at_a_time():
    counter = Counter()

    def enter() -> None:
        counter.together.wait()
        counter.enter()

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(enter) for _ in range(2)]:
            future.result()
    assert counter.most == 1
    assert counter.enter.__name__ == "enter"

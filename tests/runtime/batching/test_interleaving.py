"""Threads that run one at a time: what the choices find in code whose faults are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .interleaving import DeadlockError, Interleaving, at_random, every_interleaving


def counting(choose: Callable[[int], int], totals: list[int]) -> Interleaving:
    """Two threads that read a number and write it back, each under the lock, but not both at once."""
    interleaving, value = Interleaving(choose), [0]
    lock = interleaving.threading.Lock()

    def add() -> None:
        with lock:
            read = value[0]
        with lock:
            value[0] = read + 1

    interleaving.run(add, add)
    totals.append(value[0])
    return interleaving


def test_every_interleaving_finds_a_lost_update() -> None:
    totals: list[int] = []
    assert len(list(every_interleaving(0, lambda choose: counting(choose, totals)))) == 2  # either is first
    assert set(totals) == {2}
    for _ in every_interleaving(1, lambda choose: counting(choose, totals)):
        pass
    assert set(totals) == {1, 2}


def two_locks(choose: Callable[[int], int]) -> Interleaving:
    interleaving = Interleaving(choose)
    first, second = interleaving.threading.Lock(), interleaving.threading.Lock()

    def nested(one: object, other: object) -> None:
        with one, other:  # type: ignore[attr-defined]
            pass

    interleaving.run(lambda: nested(first, second), lambda: nested(second, first))
    return interleaving


def test_a_deadlock_is_found_and_needs_a_change() -> None:
    assert len(list(every_interleaving(0, two_locks))) == 2
    with pytest.raises(DeadlockError):
        list(every_interleaving(1, two_locks))


def test_a_wait_of_limited_time_ends_when_nothing_else_goes_on() -> None:
    interleaving = Interleaving(lambda count: 0)
    lock = interleaving.threading.Lock()
    lock.acquire()
    answers: list[bool] = []
    interleaving.run(lambda: answers.append(lock.acquire(timeout=5)))
    assert (answers, interleaving.timeouts) == ([False], 1)


def test_the_same_seed_makes_the_same_choices() -> None:
    def points(seed: int) -> list[tuple[int, bool]]:
        return counting(at_random(seed), []).points

    assert points(3) == points(3)
    assert len({tuple(points(seed)) for seed in range(20)}) > 1


def test_the_error_of_a_thread_is_raised() -> None:
    def fails() -> None:
        raise ValueError("of a thread")

    with pytest.raises(ValueError, match="of a thread"):
        Interleaving(lambda count: 0).run(fails, lambda: None)

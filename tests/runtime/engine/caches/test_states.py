"""The states of recurrences, without a graph: what a run leaves, what can be gone back to, and what moves."""

from __future__ import annotations

import pytest

from pastkey.contract.bundle import StateGeometry
from pastkey.runtime.engine.caches.states import MOST_MARKS, States, state_bytes

GEOMETRY = (StateGeometry("conv_state", (3, 2)), StateGeometry("recurrent_state", (2, 4, 5)))


@pytest.fixture
def states():
    made = States(GEOMETRY)
    made.begin(1)
    return made


def run(states: States, length: int, tokens: int) -> int:
    """As a run that writes into the states how many tokens they saw; returns their number."""
    for array in states.copies[1 - states.now]:
        array[...] = length + tokens
    states.advance(length)
    return length + tokens


def seen(states: States) -> set[float]:
    return {float(number) for array in states.copies[states.now] for number in array.flat}


def test_the_last_run_is_undone_alone(states):
    length = run(states, run(states, 0, 5), 3)
    assert [states.nearest(asked, length) for asked in (8, 7, 5, 4)] == [8, 5, 5, 0]
    assert states.back(5, length)
    assert seen(states) == {5}
    assert [states.nearest(asked, 5) for asked in (5, 4)] == [5, 0]


def test_marks_are_gone_back_to_and_the_first_stays(states):
    length = 0
    for _ in range(MOST_MARKS + 3):
        length = run(states, length, 10)
        states.mark(length)
        states.mark(length)  # no second one
    held = sorted({states.nearest(asked, length) for asked in range(length + 1)})
    assert held == [0, 10, *range(length - 10 * (MOST_MARKS - 2), length + 1, 10)]
    assert states.nbytes == (2 + MOST_MARKS) * state_bytes(GEOMETRY)
    assert not states.back(10, length)
    assert seen(states) == {10}
    assert states.nearest(length, 10) == 10


def test_a_copy_takes_the_marks_up_to_its_length(states):
    for place in range(3):
        run(states, 10 * place, 10)
        states.mark(10 * place + 10)
    other = States(GEOMETRY)
    other.begin(1)
    other.share_marks(states, 20)
    other.fill(states.at(20, 30))
    assert (seen(other), other.nearest(19, 20)) == ({20}, 10)
    assert other.at(7, 20) == []


def test_both_copies_move_and_the_current_one_comes_first(states):
    length = run(states, run(states, 0, 5), 3)
    memory = states.zeros(1), states.zeros(1)
    states.place(memory)
    assert [float(copy[0].max()) for copy in memory] == [8, 5]
    assert states.back(5, length)
    states.flip()
    assert seen(states) == {5}
    assert {float(copy[0].max()) for copy in memory} == {5}
    states.begin(1)
    assert (seen(states), states.nearest(8, 0)) == ({0}, 0)

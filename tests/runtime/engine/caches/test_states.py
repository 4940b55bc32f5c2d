"""The states of recurrences, without a graph: the states after a run, those that can be restored, and moves."""

from __future__ import annotations

import pytest

from pastkey.contract.bundle import StateGeometry
from pastkey.runtime.engine.caches.states import States, state_bytes

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
    assert [float(states.at(asked, length)[0].max()) for asked in (8, 5)] == [8, 5]
    assert (states.undo, states.back(7)) == (5, False)
    assert states.back(5) is False  # only one undo, of the last run
    length = run(states, length, 3)
    assert (states.undo, states.back(8)) == (8, True)
    assert seen(states) == {8}
    assert states.nbytes == 2 * state_bytes(GEOMETRY)


def test_both_copies_move_and_the_current_one_comes_first(states):
    run(states, run(states, 0, 5), 3)
    memory = states.zeros(1), states.zeros(1)
    states.place(memory)
    assert [float(copy[0].max()) for copy in memory] == [8, 5]
    assert states.back(5)
    states.flip()
    assert seen(states) == {5}
    assert {float(copy[0].max()) for copy in memory} == {5}
    states.begin(1)
    assert (seen(states), states.undo) == ({0}, None)

"""The mask and the positions of a run, with padding in the cache, in the run, or in neither."""

from __future__ import annotations

import numpy as np

from pastkey.runtime.engine.padding import Padding


def test_a_position_is_the_number_of_real_tokens_before_it():
    padding = Padding()
    mask, positions = padding.of_run(3, 2, 1, None)
    assert (mask.tolist(), positions.tolist()) == ([[1, 1, 1, 1]] * 2, [[3]] * 2)
    assert padding.of_run(0, 1, 3, np.array([[0, 1, 1]]))[1].tolist() == [[0, 0, 1]]
    mask, positions = padding.of_run(0, 2, 3, np.array([[1, 1, 0], [1, 1, 1]]))
    assert positions.tolist() == [[0, 1, 1], [0, 1, 2]]
    padding.mask = mask
    mask, positions = padding.of_run(3, 2, 2, None)
    assert mask.tolist() == [[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]
    assert positions.tolist() == [[2, 3], [3, 4]]
    assert positions.flags.c_contiguous


def test_what_is_left_of_it():
    padding = Padding()
    assert padding.first(3) is None
    padding.mask = np.array([[1, 0, 1]])
    assert padding.first(2).tolist() == [[1, 0]]
    assert padding.first(0) is None

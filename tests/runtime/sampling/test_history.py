"""The array follows its list."""

from __future__ import annotations

import numpy as np
import pytest

from pastkey.runtime.sampling.history import History


def test_a_list_that_grows_and_others_between():
    history, ids = History(), [1, 2]
    for token in range(1000):
        ids.append(token)
        assert history.of(ids).tolist() == ids
    assert history.of([7, 8]).tolist() == [7, 8]
    assert history.of([]).tolist() == []
    del ids[5:]
    assert history.of(ids).tolist() == ids
    assert history.of((4, 5)).tolist() == [4, 5]


def test_it_is_not_to_be_written_into():
    with pytest.raises(ValueError, match="read-only"):
        History().of([1])[0] = 2
    assert History().of([1]).dtype == np.int64

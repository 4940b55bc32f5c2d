"""Examples go whole into windows, each once, and little space is left over."""

from __future__ import annotations

import io

import numpy as np
import pytest

from pastkey.train.data import packing
from pastkey.train.data.packing import Packer


def packed(examples: list[list[int]], length: int) -> tuple[list[list[int]], Packer]:
    file = io.BytesIO()
    packer = Packer(file, length, -1, "<i2")
    for example in examples:
        packer.add(np.array(example, np.int64))
    packer.finish()
    return np.frombuffer(file.getvalue(), "<i2").reshape(-1, length).tolist(), packer


def test_an_example_goes_where_the_least_space_is_left():
    rows, packer = packed([[1] * 6, [2] * 7, [3] * 3, [4] * 4], 10)
    assert sorted(rows) == [[1] * 6 + [4] * 4, [2] * 7 + [3] * 3]
    assert packer.windows == 2
    assert packer.first == 7


@pytest.mark.parametrize("most_open", [1, 4, 512])
def test_every_example_is_whole_in_one_window(most_open, monkeypatch):
    monkeypatch.setattr(packing, "_OPEN", most_open)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 33, 500)
    rows, packer = packed([[number] * int(length) for number, length in enumerate(lengths)], 32)
    found = [[token for token in row if token >= 0] for row in rows]
    counts = [{token: row.count(token) for token in dict.fromkeys(row)} for row in found]
    assert sorted((token, count) for row in counts for token, count in row.items()) == list(enumerate(lengths))
    assert packer.windows == len(rows)
    assert rows[0][: packer.first] == [rows[0][0]] * packer.first
    if most_open == 512:
        assert sum(map(len, found)) > 0.9 * 32 * len(rows)

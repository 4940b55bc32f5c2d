"""Work on the rows of a matrix reaches each row once, and leaves torch's threads as they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pastkey.export.quantize.rounding.workers import for_each_part, one_thread_each


@pytest.mark.parametrize("rows", [0, 1, 64, 65, 300])
def test_each_row_is_worked_on_once(rows):
    found = np.zeros(rows, int)

    def work(part: slice) -> None:
        found[part] += 1

    for_each_part(work, rows)
    assert found.tolist() == [1] * rows


def test_torch_has_one_thread_in_each_worker_and_its_own_number_after():
    before = torch.get_num_threads()
    with one_thread_each() as pool:
        assert set(pool.map(lambda _: torch.get_num_threads(), range(4))) == {1}
    assert torch.get_num_threads() == before


def test_what_a_worker_raises_is_raised():
    def work(part: slice) -> None:
        if part.start == 128:
            raise ValueError("NaN or infinity")

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="NaN or infinity"):
        for_each_part(work, 300)
    assert torch.get_num_threads() == before

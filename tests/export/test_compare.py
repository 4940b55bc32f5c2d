"""How far apart two results are: relative to the largest number, without those of banned tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pastkey.export.compare import logits_difference, relative_difference

A = np.array([[-44.0, 2.0]], np.float32)
BANNED = np.array([[-44.0, -1e9]], np.float32)


@pytest.mark.parametrize("difference", [relative_difference, logits_difference])
def test_a_difference_is_relative_to_the_largest_number(difference):
    assert difference(A, A + np.float32(0.44)) == pytest.approx(0.01, rel=1e-4)
    assert difference(torch.tensor(A), torch.tensor(A) + 0.44) == pytest.approx(0.01, rel=1e-4)
    assert difference(A, A) == 0
    assert np.isnan(difference(A, A * np.float32(np.nan)))
    zeros = np.zeros((2, 3), np.float32)
    assert difference(zeros, zeros) == 0
    assert difference(zeros, zeros + np.float32(1e-6)) > 1


def test_tokens_that_both_ban_do_not_count():
    assert logits_difference(BANNED, BANNED * np.array([1, 2], np.float32)) == 0
    assert logits_difference(BANNED, A) > 1
    assert logits_difference(A, BANNED) > 1

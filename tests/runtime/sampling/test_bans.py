"""Bias, bans and forced tokens."""

from __future__ import annotations

import numpy as np

from pastkey.runtime.sampling import bans

LOGITS = np.array([1.0, 2.0, 3.0, 4.0, 5.0], np.float32)


def banned(logits: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.isneginf(logits)).tolist())


def test_a_forced_token_is_the_only_one_also_where_it_was_banned():
    found = bans.force(bans.suppress(LOGITS, [2]), 2)
    assert banned(found) == {0, 1, 3, 4}
    assert found[2] == 0


def test_nothing_is_written_into():
    LOGITS.flags.writeable = False
    bans.add_bias(LOGITS, {1: 2.0})
    bans.suppress(LOGITS, [1])
    bans.force(LOGITS, 1)
    bans.ban_bad_words(LOGITS, [1], bans.bad_words([[1]]))
    np.testing.assert_array_equal(LOGITS, [1, 2, 3, 4, 5])

"""Bias, bans and forced tokens."""

from __future__ import annotations

import numpy as np
import pytest

from pastkey.runtime.sampling import bans

LOGITS = np.array([1.0, 2.0, 3.0, 4.0, 5.0], np.float32)


def banned(logits: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.isneginf(logits)).tolist())


def test_a_bias_is_added() -> None:
    found = bans.add_bias(LOGITS, {0: 1.5, 4: -np.inf, 2: -3})
    np.testing.assert_array_equal(found, [2.5, 2, 0, 4, -np.inf])
    np.testing.assert_array_equal(bans.add_bias(LOGITS, {}), LOGITS)


def test_suppressed_tokens_have_no_probability() -> None:
    assert banned(bans.suppress(LOGITS, [3, 0, 3])) == {0, 3}
    assert banned(bans.suppress(LOGITS, ())) == set()


def test_a_forced_token_is_the_only_one_also_where_it_was_banned() -> None:
    found = bans.force(bans.suppress(LOGITS, [2]), 2)
    assert banned(found) == {0, 1, 3, 4}
    assert found[2] == 0


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([], {0}),
        ([9, 1], {0, 2}),
        ([1, 2], {0, 3}),
        ([2], {0}),  # the word is longer than the text
        ([9, 1, 2], {0, 3}),
        ([1, 9], {0}),
    ],
)
def test_the_last_token_of_a_bad_word_is_banned_where_the_others_stand(seen: list[int], expected: set[int]) -> None:
    words = bans.bad_words([[0], [1, 2], [1, 2, 3], [4]], end_ids=[4])  # an EOS token alone is none
    assert banned(bans.ban_bad_words(LOGITS, seen, words)) == expected


def test_nothing_is_written_into() -> None:
    LOGITS.flags.writeable = False
    bans.add_bias(LOGITS, {1: 2.0})
    bans.suppress(LOGITS, [1])
    bans.force(LOGITS, 1)
    bans.ban_bad_words(LOGITS, [1], bans.bad_words([[1]]))
    np.testing.assert_array_equal(LOGITS, [1, 2, 3, 4, 5])

"""A caller's function, the ids that it is given, and the log-probabilities that a caller is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pastkey.errors import InputError
from pastkey.runtime.sampling.history import History
from pastkey.runtime.sampling.log_probs import likeliest, token_logprob
from pastkey.runtime.sampling.processors import apply_processor

LOGITS = np.array([1.0, -np.inf, 3.0], np.float32)
IDS = np.array([4, 5])


def test_it_is_given_copies_that_it_may_write_into():
    LOGITS.flags.writeable = IDS.flags.writeable = False

    def processor(ids: Any, logits: Any) -> Any:
        assert (ids.dtype, ids.tolist(), logits.dtype) == (np.int64, [4, 5], np.float32)
        np.testing.assert_array_equal(logits, LOGITS)
        ids[0] = 0
        logits[2] = -np.inf
        return logits

    np.testing.assert_array_equal(apply_processor(LOGITS, IDS, processor), [1, -np.inf, -np.inf])
    assert (LOGITS[2], IDS[0]) == (3, 4)


def test_it_is_given_float32_also_of_what_float32_cannot_hold():
    found = apply_processor(np.array([1e308, -1e308, -np.inf]), IDS, lambda _, logits: logits)
    most = np.finfo(np.float32).max
    np.testing.assert_array_equal(found, [most, -most, -np.inf])


def test_it_may_give_another_array_of_another_precision():
    found = apply_processor(LOGITS, IDS, lambda _, logits: logits.astype(np.float64) * 2)
    np.testing.assert_array_equal(found, [2, -np.inf, 6])


def raising(ids: Any, logits: Any) -> Any:
    raise KeyError("no such word")


class Wrong:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self, ids: Any, logits: Any) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (raising, "logits_processor raising raised KeyError: 'no such word'"),
        (Wrong(None), "logits_processor Wrong returned NoneType; .* return an array of numpy"),
        (Wrong(np.zeros(4)), r"returned float64 of shape \(4,\); logits of shape \(3,\)"),
        (Wrong(np.zeros(3, np.int64)), r"returned int64 of shape \(3,\)"),
        (Wrong(np.array([0, np.inf, 1])), "returned NaN or infinity"),
        (lambda ids: ids, "raised TypeError"),
    ],
)
def test_what_is_wrong_with_it_is_told(processor, message):
    with pytest.raises(InputError, match=message):
        apply_processor(LOGITS, IDS, processor)


# --- the ids as an array --------------------------------------------------------------------------------------------
def test_a_list_that_grows_and_others_between():
    history, ids = History(), [1, 2]
    for token in range(1000):
        ids.append(token)
        assert history.of(ids).tolist() == ids
    for other in ([7, 8], [], ids[:5], (4, 5)):
        assert history.of(other).tolist() == [*other]
    with pytest.raises(ValueError, match="read-only"):
        history.of([1])[0] = 2
    assert history.of([1]).dtype == np.int64


# --- log-probabilities ----------------------------------------------------------------------------------------------
@given(
    logits=arrays(np.float32, st.integers(1, 40), elements=st.floats(-300, 300, width=32)),
    top=st.integers(0, 45),
    place=st.integers(0, 39),
)
def test_they_are_the_log_softmax(logits, top, place):
    token = place % logits.size
    wide = logits.astype(np.float64) - logits.max()
    expected = wide - np.log(np.exp(wide).sum())
    found = token_logprob(logits, token, top)
    assert (found.id, found.logprob) == (token, pytest.approx(expected[token], rel=1e-6, abs=1e-5))
    best = np.argsort(-logits, kind="stable")[:top]
    assert [i for i, _ in found.top] == best.tolist()
    np.testing.assert_allclose([p for _, p in found.top], expected[best], rtol=1e-6, atol=1e-5)


def test_of_equal_ones_the_smaller_id_comes_first():
    assert likeliest(np.array([1, 5, 5, 2, 5], np.float32), 2) == [1, 2]
    assert likeliest(np.array([1, 5], np.float32), 0) == []

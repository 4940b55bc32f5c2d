"""A caller's function: what it is given, and what is refused of it in a sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pastkey.errors import InputError
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
    assert LOGITS[2] == 3
    assert IDS[0] == 4


def test_it_is_given_float32_also_of_what_float32_cannot_hold():
    wide = np.array([1e308, -1e308, -np.inf])
    found = apply_processor(wide, IDS, lambda _, logits: logits)
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

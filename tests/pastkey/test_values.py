"""What is asked of a value."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pastkey.errors import InputError
from pastkey.values import as_path, is_int, is_number, parse_version


@pytest.mark.parametrize(
    ("value", "whole", "number"),
    [
        (3, True, True),
        (-3, True, True),
        (10**400, True, True),
        (np.int64(3), True, True),
        (3.0, False, True),
        (np.float32(3), False, True),
        (Fraction(1, 3), False, True),
        (True, False, False),
        (np.bool_(True), False, False),
        (float("nan"), False, False),
        (-float("inf"), False, False),
        ("3", False, False),
        (None, False, False),
        (3j, False, False),
    ],
)
def test_a_whole_number_and_a_number_are_told_from_what_looks_like_one(value: Any, whole: bool, number: bool) -> None:
    assert (is_int(value), is_number(value)) == (whole, number)


def test_a_path_is_a_text_or_a_path() -> None:
    assert as_path("a/b") == as_path(Path("a/b")) == Path("a/b")
    for wrong in (None, 5, b"a", ["a"]):
        with pytest.raises(InputError, match=r"path is .*; it must be the path of a file, as a str or a Path"):
            as_path(wrong)


def test_a_whole_number_may_have_a_least() -> None:
    assert [is_int(value, 2) for value in (1, 2, np.int32(3), True, "3")] == [False, True, True, False, False]


@pytest.mark.parametrize(
    ("text", "numbers"), [("1.32.0", (1, 32, 0)), ("1.23", (1, 23, 0)), ("1.33.0.dev20261102", (1, 33, 0))]
)
def test_a_version_is_its_first_three_numbers(text: str, numbers: tuple[int, int, int]) -> None:
    assert parse_version(text) == numbers

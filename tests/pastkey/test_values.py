"""The checks of a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from pastkey.errors import InputError
from pastkey.typed import Between, Size, TokenId, parse
from pastkey.values import as_path, is_collection, is_int, is_number, is_one_of, parse_version, shown, size_in_bytes

from ..wrong_values import without, wrong_fields


def test_a_whole_number_and_a_number_are_told_from_what_looks_like_one():
    whole, others = (3, 10**400, np.int64(3)), (3.0, Fraction(1, 3))
    neither = (True, np.bool_(True), float("nan"), None, "3")
    assert all(is_int(value) and is_number(value) for value in whole)
    assert all(is_number(value) and not is_int(value) for value in others)
    assert not any(is_int(value) or is_number(value) for value in neither)
    assert [is_int(value, 2) for value in (1, 2)] == [False, True]


@pytest.mark.parametrize(
    ("value", "size"),
    [(7, 7), (np.int64(7), 7), ("7", 7), ("2GB", 2 * 10**9), ("1.5 gb", 15 * 10**8), ("3kb", 3000), ("0.5MB", 500_000)],
)
def test_a_size_is_a_number_of_bytes_or_a_text(value, size):
    assert size_in_bytes(value, "size") == size


@pytest.mark.parametrize("value", [0, -1, "0GB", "", "GB", "2TB", "2GiB", "-2GB", 2.5, True, None, "1e3", "\u0661GB"])
def test_what_is_no_size_is_told(value):
    with pytest.raises(InputError, match=r"^shard_size is .*; it must be a number of bytes, such as 500MB or 2GB$"):
        size_in_bytes(value, "shard_size")


def test_a_path_is_a_text_or_a_path():
    assert as_path("a/b") == as_path(Path("a/b")) == Path("a/b")
    wrong: tuple[Any, ...] = (None, 5, b"secret", ["a"])
    for value in wrong:
        with pytest.raises(TypeError, match=r"^((?!secret).)*$"):  # a key's bytes are shown to nobody
            as_path(value)


class Silent:
    def __repr__(self) -> str:
        raise RuntimeError


def test_any_value_is_shown_in_one_short_line():
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    assert shown(Silent()) == "an object of the class Silent"
    assert shown(deep) == shown([10**5000]) == "an object of the class list"
    assert shown(np.ones((2, 2), int)) == "array([[1, 1], [1, 1]])"
    assert shown(10**5000) == "a number of more than 80 digits"
    assert shown("a\n  b") == r"'a\n  b'"
    assert len(shown("a" * 5000)) == 80


def test_what_has_parts_is_told_from_what_has_none():
    parts: tuple[Any, ...] = ([], (1,), {1}, range(2), np.ones(1))
    none: tuple[Any, ...] = ("a", b"a", {1: 2}, np.array(1), None, 1, iter([1]), int)
    assert [is_collection(value) for value in (*parts, *none)] == [True] * len(parts) + [False] * len(none)
    assert is_one_of("a", ("a", "b"))
    assert not any(is_one_of(value, ("a", "b")) for value in ("c", None, np.array(["a"]), ["a"]))


@pytest.mark.parametrize(
    ("text", "numbers"), [("1.32.0", (1, 32, 0)), ("1.23", (1, 23, 0)), ("1.33.0.dev20261102", (1, 33, 0))]
)
def test_a_version_is_its_first_three_numbers(text, numbers):
    assert parse_version(text) == numbers


# --- dataclasses of JSON: by the type and range of each field ------------------------------------------------------
@dataclass(frozen=True)
class Inner:
    size: Size


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"] = "a"
    rate: Annotated[float, Between(0, 1)] = 0.5
    token: TokenId | None = None
    inner: tuple[Inner, ...] = ()
    pair: tuple[int, int] = (0, 0)
    counts: Mapping[str, int] = field(default_factory=dict)
    on: bool = True
    anything: Any = None


def test_what_fits_is_made():
    content = {"kind": "b", "rate": 1, "token": 0, "inner": [{"size": 3}], "counts": {"x": -1}, "on": False}
    assert parse(Outer, {"name": "n"} | content) == Outer("n", "b", 1, 0, (Inner(3),), (0, 0), {"x": -1}, on=False)
    assert parse(Outer, {"name": "n", "anything": [1, {"a": None}]}).anything == [1, {"a": None}]
    assert parse(Inner, {"size": 1, "more": 2}, further=True) == Inner(1)


def test_what_does_not_fit_is_named_and_the_limits_fit():
    for name, value in wrong_fields(Outer):
        with pytest.raises(InputError, match=r"inner|size" if name == "inner" else name) as caught:
            parse(Outer, without({"name": "n"}, name, value))
        assert len(str(caught.value)) < 300
    for fields in ({"rate": 0}, {"rate": 1}, {"token": 2**31 - 1}, {"token": None}, {"inner": [{"size": 1}]}):
        parse(Outer, {"name": "n", **fields})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"name": "n", "x": 1}, "the content has an unknown key 'x'"),
        ([], "the content is .*; it must be an object"),
        ({"name": "n", "kind": "c"}, "kind is 'c'; it must be one of a, b"),
        ({"name": "n", "token": -1}, "token is -1; it must be a number from 0 to 2147483647"),
        ({"name": "n", "pair": [1]}, "pair is .*; it must be a list of 2"),
        ({"name": "n", "on": ["x"] * 10**5}, "on is a list of 100,000; it must be true or false"),
    ],
)
def test_the_sentence_says_what_is_expected(content, words):
    with pytest.raises(InputError, match=words):
        parse(Outer, content)

"""Dataclasses of JSON: by the type and range of each field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from pastkey.errors import InputError
from pastkey.typed import Between, Size, TokenId, parse

from ..wrong_values import without, wrong_fields


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
    found = parse(
        Outer,
        {"name": "n", "kind": "b", "rate": 1, "token": 0, "inner": [{"size": 3}], "counts": {"x": -1}, "on": False},
    )
    assert found == Outer("n", "b", 1, 0, (Inner(3),), (0, 0), {"x": -1}, on=False)
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
        ({"name": "n", "kind": "c"}, "kind is 'c'; it must be a, b"),
        ({"name": "n", "rate": 10**4000}, "a number of more than 80 digits; it must be a finite number"),
        ({"name": "n", "token": -1}, "token is -1; it must be a number from 0 to 2147483647"),
        ({"name": "n", "pair": [1]}, "pair is .*; it must be a list of 2"),
        ({"name": "n", "on": ["x"] * 10**5}, "on is a list of 100,000; it must be true or false"),
    ],
)
def test_the_sentence_says_what_is_expected(content, words):
    with pytest.raises(InputError, match=words):
        parse(Outer, content)

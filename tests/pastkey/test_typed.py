"""Dataclasses of JSON: by the type and range of each field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from pastkey.errors import InputError
from pastkey.typed import Between, Size, TokenId, parse


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
    counts: Mapping[str, int] = field(default_factory=dict)
    on: bool = True
    anything: Any = None


def test_what_fits_is_made():
    found = parse(
        Outer,
        {"name": "n", "kind": "b", "rate": 1, "token": 0, "inner": [{"size": 3}], "counts": {"x": -1}, "on": False},
    )
    assert found == Outer("n", "b", 1, 0, (Inner(3),), {"x": -1}, on=False)
    assert parse(Outer, {"name": "n", "anything": [1, {"a": None}]}).anything == [1, {"a": None}]
    assert parse(Inner, {"size": 1, "more": 2}, further=True) == Inner(1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "the content has no 'name'"),
        ({"name": "n", "x": 1}, "the content has an unknown key 'x'"),
        ([], "the content is .*; it must be an object"),
        ({"name": 1}, "name is 1; it must be a text"),
        ({"name": "\ud800"}, "it must be a text"),
        ({"name": "n", "kind": "c"}, "kind is 'c'; it must be a, b"),
        ({"name": "n", "kind": ["a"]}, "it must be a, b"),
        ({"name": "n", "rate": 2}, "rate is 2; it must be a number from 0 to 1"),
        ({"name": "n", "rate": float("inf")}, "it must be a finite number"),
        ({"name": "n", "rate": 10**4000}, "a number of more than 80 digits; it must be a finite number"),
        ({"name": "n", "token": True}, "token is True; it must be a whole number"),
        ({"name": "n", "token": -1}, "token is -1; it must be a number from 0 to 2147483647"),
        ({"name": "n", "inner": {"size": 1}}, "inner is .*; it must be a list"),
        ({"name": "n", "inner": [{"size": 0}]}, "size is 0"),
        ({"name": "n", "inner": [1] * 10**5}, "it must be an object"),
        ({"name": "n", "counts": []}, "it must be an object"),
        ({"name": "n", "counts": {"x": 1.5}}, "it must be a whole number"),
        ({"name": "n", "on": 1}, "on is 1; it must be true or false"),
        ({"name": "n", "on": ["x"] * 10**5}, "on is a list of 100,000; it must be true or false"),
    ],
)
def test_what_does_not_fit_is_named(content, words):
    with pytest.raises(InputError, match=words) as caught:
        parse(Outer, content)
    assert len(str(caught.value)) < 300

"""Values that the fields of a dataclass cannot have, by their annotations: of another type, or out of their range."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pastkey.typed import Between

DROPPED = object()
NO_NUMBER = (True, "1", [1], {"a": 1})
HUGE = 10**4000  # more digits than Python writes


def without(content: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The content with this value for that field, or without it."""
    return {key: part for key, part in {**content, name: value}.items() if part is not DROPPED}


def wrong_fields(kind: Any) -> Iterator[tuple[str, Any]]:
    """Yields the name of a field of a dataclass and a value that it cannot have, DROPPED where it has no default."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        if field.default is field.default_factory is dataclasses.MISSING:
            yield field.name, DROPPED
        yield from ((field.name, value) for value in _wrong(hints[field.name]))


def _wrong(hint: Any) -> Iterator[Any]:
    origin, given = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (own,) = (part for part in given if part is not types.NoneType)
        yield from (value for value in _wrong(own) if value is not None)
        return
    if hint is not Any:
        yield None
    if origin is Annotated:
        limits: Between = given[1]
        yield from (value for value in _wrong(given[0]) if value is not None)
        yield from (limits.least - 1, limits.most * 2)
    elif hint in (int, float):
        yield from (*NO_NUMBER, float("nan"), float("inf"), -float("inf"), 1.5 if hint is int else HUGE)
    elif hint is bool:
        yield from (1, 0, "true", [True])
    elif hint is str:
        yield from (1, True, ["a"], "\ud800")
    elif origin is Literal:
        yield from (1, [given[0]], f"{given[0]} ")
    elif origin in (tuple, list):
        yield from ("ab", 1, {"a": 1}, *([value] for value in _wrong(given[0])))
    elif origin in (Mapping, dict):
        yield from ([], "ab", 1, *({"a": value} for value in _wrong(given[1])))
    elif dataclasses.is_dataclass(hint):
        yield from ([], "ab", 1, {"of nobody": 1} | _right(hint))
        yield from (without(_right(hint), name, value) for name, value in wrong_fields(hint))


def _right(hint: Any) -> Any:
    """Some value of this type, as in JSON."""
    origin, given = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return type(_right(given[0]))(given[1].least)
    if origin is Literal:
        return given[0]
    if origin in (tuple, list):
        return [_right(given[0])]
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        required = (field for field in dataclasses.fields(hint) if field.default is dataclasses.MISSING)
        return {field.name: _right(hints[field.name]) for field in required}
    return {int: 1, float: 1.0, str: "a", bool: True}.get(hint)

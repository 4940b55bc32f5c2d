"""Parses a JSON object into a dataclass, by the types and ranges in its annotations.

    Count = Annotated[int, Between(1, 2**31 - 1)]

    @dataclass(frozen=True)
    class Layer:
        heads: Count
        bias: float | None = None

    parse(Layer, {"heads": 4}) == Layer(4)

Supported are bool, int, float, str, None, Any, Literal, Annotated, unions with None, tuple[X, ...], tuple[X, Y],
list[X], Mapping[str, X], dict[str, X] and dataclasses; a field of another type is an error. A bool is not a number,
numbers are finite, and texts are valid Unicode.

`check_of` makes the check of an argument from Python of such a type, which also may be a union, a Sequence or a
Callable.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeVar

from .errors import InputError
from .values import is_collection, is_int, is_number, is_one_of, is_unicode, shown

T = TypeVar("T")
_LARGEST: Final = 2**31 - 1  # of a size or an id: onnxruntime and torch allow more, no model needs it


@dataclass(frozen=True)
class Between:
    """The range of a number. `above`: without `least` itself."""

    least: float
    most: float = _LARGEST
    above: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a number is in the range."""
        return bool(self.least <= value <= self.most) and not (self.above and value == self.least)

    def __str__(self) -> str:
        most = "" if self.most == math.inf else f" to {self.most}"
        return f"a number {'above' if self.above else 'from'} {self.least}{most}"


@dataclass(frozen=True)
class Where:
    """A check instead of the annotated type's. Only for `check_of`."""

    holds: Callable[[Any], bool]


# The plain types: their checks, and their words in an error.
_PLAIN: Final[Mapping[Any, tuple[Callable[[Any], bool], str]]] = {
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (is_int, "a whole number"),
    float: (is_number, "a finite number"),
    str: (lambda value: isinstance(value, str), "a text"),
}

Size = Annotated[int, Between(1)]
TokenId = Annotated[int, Between(0)]
Natural = Annotated[int, Between(0, 2**63 - 1)]
Positive = Annotated[float, Between(0, math.inf, above=True)]


def parse(kind: type[T], value: Any, name: str = "the content", *, further: bool = False) -> T:
    """Parses `value`, JSON, as `kind`. Raises InputError naming the field of another type or out of range.

    A key without a field is also an error, or skipped with `further`.
    """
    found: T = _parse(kind, value, name, further)
    return found


def check(made: Any, flags: bool = False) -> None:
    """Checks the fields of a dataclass by their types. Raises InputError as `parse`; `flags` names them as flags."""
    of: Any = type(made)
    for name, kind in _hints(of).items():
        _parse(kind, getattr(made, name), "--" + name.replace("_", "-") if flags else name, False)


def _parse(kind: Any, value: Any, name: str, further: bool) -> Any:
    origin, given = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _within(_parse(given[0], value, name, further), given[1], name)
    if origin in (typing.Union, types.UnionType):
        (own,) = (part for part in given if part is not types.NoneType)
        return None if value is None else _parse(own, value, name, further)
    if origin is Literal:
        return (
            value if isinstance(value, str) and value in given else _refuse(name, value, "one of " + ", ".join(given))
        )
    if origin in (tuple, list):
        listed = value if isinstance(value, list | tuple) else _refuse(name, value, "a list")
        kinds = [given[0]] * len(listed) if origin is list or given[-1] is ... else given
        if len(kinds) != len(listed):
            _refuse(name, value, f"a list of {len(kinds)}")
        parts = [_parse(kind, part, f"{name}[{i}]", further) for i, (kind, part) in enumerate(zip(kinds, listed))]  # noqa: B905
        return origin(parts)
    if origin in (Mapping, dict):
        named = value if isinstance(value, Mapping) else _refuse(name, value, "an object")
        return {
            _parse(str, key, f"a key of {name}", further): _parse(given[1], part, f"{name}.{key}"[:80], further)
            for key, part in named.items()
        }
    if dataclasses.is_dataclass(kind):
        return _fields(kind, value, name, further)
    return value if kind is Any else _plain(kind, value, name)


def _plain(kind: Any, value: Any, name: str) -> Any:
    valid, expected = _PLAIN.get(kind) or _refuse(name, value, "left out")
    if not valid(value):
        _refuse(name, value, expected)
    if kind is float:
        return _float(value) if abs(value) < 2**1023 else _refuse(name, value, expected)
    if kind is str:
        return value if is_unicode(value) else _refuse(name, value, expected)
    return int(value) if kind is int else value


def _float(value: float) -> float:
    """Keeps a whole number an int, so that it is written as it was read."""
    return int(value) if is_int(value) else float(value)


def _within(value: Any, limits: Between, name: str) -> Any:
    if value is not None and not limits.holds(value):
        _refuse(name, value, str(limits))
    return value


@functools.cache
def check_of(kind: Any) -> Callable[[Any], bool]:
    """Returns the check of an argument. Numbers may be numpy's, and any ordered collection is a Sequence."""
    origin, given = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        rule = next((part for part in given[1:] if isinstance(part, Between | Where)), None)
        if isinstance(rule, Where):
            return rule.holds
        plain = check_of(given[0])
        return plain if rule is None else lambda value: plain(value) and rule.holds(value)
    if origin is Literal:
        return lambda value: is_one_of(value, given)
    if origin is Callable:
        return callable
    parts = [check_of(part) for part in given]
    if origin in (typing.Union, types.UnionType):
        return lambda value: any(valid(value) for valid in parts)
    if origin is Sequence:
        return lambda value: is_collection(value) and all(map(parts[0], value))
    if origin is Mapping:
        return lambda value: (
            isinstance(value, Mapping) and all(map(parts[0], value)) and all(map(parts[1], value.values()))
        )
    return (lambda value: True) if kind is Any else _PLAIN[kind][0]


@functools.cache
def _hints(kind: Any) -> Mapping[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _fields(kind: Any, value: Any, name: str, further: bool) -> Any:
    if dataclasses.is_dataclass(value):
        return value
    content = value if isinstance(value, Mapping) else _refuse(name, value, "an object")
    own = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(str(key) for key in content if key not in own)
    if unknown and not further:
        raise InputError(f"{name} has an unknown key {unknown[0]!r:.60}")
    missing = dataclasses.MISSING
    for key, field in own.items():
        if key not in content and field.default is missing and field.default_factory is missing:
            raise InputError(f"{name} has no {key!r}")
    hints = _hints(kind)
    return kind(**{key: _parse(hints[key], content[key], key, further) for key in own if key in content})


def _refuse(name: str, value: object, expected: str) -> Any:
    raise InputError(f"{name} is {shown(value)}; it must be {expected}")

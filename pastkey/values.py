"""Checks of values that all stages share."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sized
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from .errors import InputError

T = TypeVar("T")


def is_int(value: object, least: int | None = None, most: int | None = None) -> TypeGuard[int]:
    """Whether it is a whole number, also numpy's, from `least` to `most`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        return False
    return (least is None or int(value) >= least) and (most is None or int(value) <= most)


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}  # as `shown_bytes` writes them


def size_in_bytes(value: object, name: str) -> int:
    """Returns a number of bytes, given as a whole number or as text such as "500MB". Raises InputError."""
    text = value.strip().upper() if isinstance(value, str) else str(value) if is_int(value) else ""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?(|KB|MB|GB)", text)
    size = 0 if found is None else int(float(found[1]) * _UNITS[found[2]])
    require(size > 0, name, value, "a number of bytes, such as 500MB or 2GB")
    return size


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite real number, also numpy's."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    return bool(value < math.inf) and not bool(value <= -math.inf)  # also for ints beyond float


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raises InputError for a value unless the condition holds."""
    if not condition:
        raise InputError(f"{name} is {shown(value)}; it must be {expected}", option=name)


def require_type(condition: bool, name: str, value: object, expected: str) -> None:
    """Raises TypeError for an argument from Python unless the condition holds. Its value, maybe a key, is not shown."""
    if not condition:
        raise TypeError(f"{name} is of the type {type(value).__name__}; it must be {expected}")


def or_default(value: T | None, default: T) -> T:
    """Returns the value, or the default if it is None, which means "not set"."""
    return default if value is None else value


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8: it has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_one_of(value: object, known: Collection[str]) -> TypeGuard[str]:
    """Whether it is one of these texts."""
    return isinstance(value, str) and value in known


def is_collection(value: object) -> TypeGuard[Collection[Any]]:
    """Whether it can be iterated more than once and is not a text, a mapping, or an array without dimensions."""
    named = isinstance(value, str | bytes | bytearray | memoryview | Mapping)
    return isinstance(value, Sized) and isinstance(value, Iterable) and not named and getattr(value, "ndim", 1) > 0


def as_path(value: str | os.PathLike[str], name: str = "path", expected: str = "the path of a file") -> Path:
    """Returns the path, which need not exist. Raises TypeError for other values."""
    require_type(isinstance(value, str | os.PathLike), name, value, expected)
    return Path(value)


def shown(value: object, longest: int = 80) -> str:
    """Formats a value for a sentence, in one line, however large it is and whatever its repr does."""
    if isinstance(value, int) and abs(value) >= 10**longest:  # Python refuses to write more than 4,300 digits
        return f"a number of more than {longest} digits"
    if isinstance(value, list | tuple | dict) and len(value) > 20:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    try:
        text = re.sub(r"\s*\n\s*", " ", repr(value))
    except Exception:  # nested too deeply, contains a huge number, or is of the caller's own class
        text = f"an object of the class {type(value).__name__}"
    return text if len(text) <= longest else text[: longest - 1] + "…"


def parse_version(text: str) -> tuple[int, int, int]:
    """Returns the first three numbers of a version: "1.32.0.dev3" -> (1, 32, 0)."""
    found = [int(number) for number in re.findall(r"[0-9]{1,9}", text)[:3]]
    major, minor, patch = (*found, 0, 0, 0)[:3]
    return major, minor, patch

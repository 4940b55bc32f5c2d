"""What every stage asks of a value."""

from __future__ import annotations

import math
import numbers
import os
import re
from pathlib import Path
from typing import TypeGuard

from .errors import InputError


def is_int(value: object, least: int | None = None, most: int | None = None) -> TypeGuard[int]:
    """Whether it is a whole number, of numpy too, not below `least` and not above `most`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        return False
    return (least is None or int(value) >= least) and (most is None or int(value) <= most)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite real number, of numpy too."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    return bool(value < math.inf) and not bool(value <= -math.inf)  # of a whole number that no float holds, too


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raises InputError for a setting unless the condition holds."""
    if not condition:
        raise InputError(f"{name} is {shown(value)}; it must be {expected}")


def as_path(value: object) -> Path:
    """The path of a file. Raises InputError for what is none."""
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"path is {shown(value)}; it must be the path of a file, as a str or a Path")
    return Path(value)


def shown(value: object, longest: int = 80) -> str:
    """A value as a sentence shows it, however large it is."""
    if isinstance(value, int) and abs(value) >= 10**longest:  # Python refuses to write more than 4,300 digits
        return f"a number of more than {longest} digits"
    if isinstance(value, list | tuple | dict) and len(value) > 20:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    text = repr(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def parse_version(text: str) -> tuple[int, int, int]:
    """The three numbers that a version starts with: "1.32.0.dev3" -> (1, 32, 0)."""
    numbers = [int(number) for number in re.findall(r"[0-9]{1,9}", text)[:3]]
    major, minor, patch = (*numbers, 0, 0, 0)[:3]
    return major, minor, patch

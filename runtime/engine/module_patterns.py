r"""Finds the pattern of a module's name as peft does: the first one for which `(.*\.)?(PATTERN)$` matches.

peft matches by Python's `re`, which takes exponential time on some patterns. Here each part of a pattern leads from the
places in the name where it may begin to those where it may end, so that no place is tried twice.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Set
from pathlib import Path
from typing import NamedTuple

from pastkey.errors import InputError
from pastkey.values import shown

_ESCAPED = r"\\[dDsSwW\W_]"
_CHARACTER = rf"(?:{_ESCAPED}|\[\^?(?:{_ESCAPED}|[\w./:-])+\]|[^\\^$|?*+()\[\]{{}}])"
_TIMES = r"([*+?]|\{\d{1,3}\}|\{\d{0,3},\d{0,3}\})\??"
_ONCE = r"(?![*+?{])"
# A repeated character; characters or an anchor; a sign. A run is cut, so that a step takes little time.
_PART = re.compile(rf"({_CHARACTER}){_TIMES}|((?:{_CHARACTER}{_ONCE}){{1,64}}|[$^]{_ONCE})|(\((?:\?:)?|\||\){_ONCE})")
_TIMES_OF = {"*": (0, sys.maxsize), "+": (1, sys.maxsize), "?": (0, 1), None: (1, 1)}
_MOST_STEPS = 6_000_000  # at most 2 s; 900 names on 900 modules take 4,600,000
_COMPILING = 200  # steps that take as long as to compile a part


class _Characters(NamedTuple):
    """What a part matches, and how often."""

    once: re.Pattern[str]
    least: int
    most: int


class ModulePatterns:
    """The patterns of one adapter, in order."""

    def __init__(self, patterns: Iterable[str], file: Path) -> None:
        """`file`: where they stand, for errors. Raises InputError for a pattern that is not of the bounded subset."""
        self._file, self._steps = file, 0
        self._parts = {pattern: self._parsed(pattern) for pattern in patterns}

    def first(self, name: str) -> str | None:
        """The first pattern that matches a module's name. Raises InputError if that takes too long."""
        starts = {0, *(place for place, before in enumerate(name, 1) if before == ".")}
        return next((pattern for pattern, parts in self._parts.items() if self._match(parts, name, starts)), None)

    def _parsed(self, pattern: str) -> list[_Characters | str]:
        parts: list[_Characters | str] = []
        place = depth = 0
        while place < len(pattern):
            self._count(_COMPILING)
            found = _PART.match(pattern, place)
            repeated, times, run, sign = found.groups() if found else (None,) * 4
            depth += {"(": 1, ")": -1}.get((sign or "|")[0], 0)
            try:
                if found is None or depth < 0:
                    raise ValueError
                parts.append(sign[0] if sign else _Characters(re.compile(repeated or run or ""), *_numbers(times)))
            except (re.error, ValueError):
                raise self._refusal(pattern) from None
            place = found.end()
        if depth:
            raise self._refusal(pattern)
        return parts

    def _match(self, parts: Iterable[_Characters | str], name: str, starts: Set[int]) -> bool:
        """Whether the parts lead from one of the places `starts` to the end of the name."""
        outer: list[tuple[Set[int], set[int]]] = []
        here, ends = starts, set[int]()  # where this branch has come to, and where those before it ended
        for part in parts:
            self._count(1 + len(here))
            if isinstance(part, _Characters):
                here = self._after(part, name, here)
            elif part == "(":
                outer.append((starts, ends))
                starts, ends = here, set()
            elif part == "|":
                ends |= here
                here = starts
            else:
                here = ends | here
                starts, ends = outer.pop()
        return len(name) in ends | here

    def _after(self, part: _Characters, name: str, here: Set[int]) -> Set[int]:
        """The places where a part ends that begins at one of the places `here`."""
        ends = set[int]() if part.least else set(here)
        for count in range(1, part.most + 1):
            self._count(len(here))
            here = {found.end() for place in here if (found := part.once.match(name, place))} - ends
            if count >= part.least:
                ends |= here
            if not here:
                break
        return ends

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MOST_STEPS:
            raise InputError(
                f"{self._file} has an alpha_pattern that takes too long to match with the adapter's modules: merge the "
                "adapter (merge_and_unload), then export"
            )

    def _refusal(self, pattern: str) -> InputError:
        return InputError(
            f"{self._file} has the alpha_pattern {shown(pattern)}; names and plain patterns are read: characters, "
            "classes, groups and |, where * + ? and {} follow single characters: merge the adapter (merge_and_unload), "
            "then export"
        )


def _numbers(times: str | None) -> tuple[int, int]:
    """The least and the largest number of repetitions. Raises ValueError."""
    if times in _TIMES_OF:
        return _TIMES_OF[times]
    least, comma, most = (times or "").strip("{}").partition(",")
    found = int(least or 0), int(most or sys.maxsize) if comma else int(least)
    if found[0] > found[1]:
        raise ValueError
    return found

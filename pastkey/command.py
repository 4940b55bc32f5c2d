"""What the commands of all stages share: their shape, argument types, and how they report."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from .errors import InputError


class Parser(argparse.ArgumentParser):
    """argparse, with one sentence in place of usage and message."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


@dataclass(frozen=True)
class Command:
    """One command: how it adds its arguments, and what it runs. `run` returns the exit status."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def positive_int(text: str) -> int:
    """argparse type: a whole number from 1."""
    value = _int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return value


def natural_int(text: str) -> int:
    """argparse type: a whole number from 0."""
    value = _int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0")
    return value


def finite_float(text: str) -> float:
    """argparse type: a number that is neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def id_list(text: str) -> list[int]:
    """argparse type: comma-separated token ids."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 1,2,3") from None


def decode_input(content: bytes) -> str:
    """The text of what came in on standard input. Raises InputError unless it is UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError("standard input is not valid UTF-8: convert it first") from None


def say(text: str) -> None:
    """A line of progress or result for a person, on standard error: standard output is for the result itself."""
    print(text, file=sys.stderr, flush=True)


def print_json(content: Mapping[str, Any]) -> None:
    """The one JSON object of --json."""
    print(json.dumps(content, ensure_ascii=False, allow_nan=False), flush=True)

"""Shared code of all commands: their shape, argument types, and output."""

from __future__ import annotations

import argparse
import difflib
import io
import json
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from .errors import InputError
from .files.folder import decode_text
from .values import shown


class _Formatter(argparse.HelpFormatter):
    """Tells the default of a flag that has one, unless its help does."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.help or ""
        known = action.default not in (None, argparse.SUPPRESS, "", []) and action.nargs != 0
        return told + " (default: %(default)s)" if known and "(default" not in told else told


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose usage is one line, and that prints one sentence instead of usage and message."""

    given: Sequence[str] = ()  # the words that it parsed

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": _Formatter} | settings)

    def format_help(self) -> str:
        """See ArgumentParser."""
        one_of = [group._group_actions[0] for group in self._mutually_exclusive_groups if group.required]
        needed = [action for action in self._actions if action.required and action.option_strings]
        plain = [f"{one.metavar}" if one.required else f"[{one.metavar}]" for one in self._get_positional_actions()]
        flags = [f"{action.option_strings[-1]} {action.metavar}" for action in (*needed, *one_of)]
        self.usage = " ".join([self.prog, *plain, *flags, "[options]"]).replace("%", "%%")
        return super().format_help()

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """See ArgumentParser."""
        self.given = sys.argv[1:] if args is None else args
        return super().parse_args(args)

    def error(self, message: str) -> NoReturn:
        flags = [word.partition("=")[0] for word in self.given if word.startswith("--")]
        known = list(self._option_string_actions)
        for flag in flags:  # report an unknown flag before arguments that it leaves missing
            if not any(name.startswith(flag) for name in known):
                near = difflib.get_close_matches(flag, known, 1)
                message = f"no flag {flag}" + (f"; did you mean {near[0]}?" if near else "")
                break
        plain = len(self._get_positional_actions())
        if len(self.given) > plain and not any(word.startswith("-") for word in self.given):
            message = f"{shown(self.given[plain])} is given without a flag; {message}"
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


@dataclass(frozen=True)
class Command:
    """One command: adds its arguments, and runs. `run` returns the exit status."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def positive_int(text: str) -> int:
    """argparse type: a whole number from 1."""
    value = whole_int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return value


def natural_int(text: str) -> int:
    """argparse type: a whole number from 0."""
    value = whole_int(text)
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


def byte_count(text: str) -> int:
    """argparse type: a number of bytes, also as 4e9."""
    return int(finite_float(text))


def whole_int(text: str) -> int:
    """argparse type: a whole number."""
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


def key_value(text: str) -> tuple[str, str]:
    """argparse type: K=V."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return key, value


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose where a bundle runs."""
    device = parser.add_argument_group("device", "PASTKEY_NATIVE=0 in the environment runs onnxruntime's kernels.")
    add = device.add_argument
    add("--threads", metavar="N", type=positive_int, help="threads within an operator (default: physical cores)")
    add(
        "--provider",
        metavar="NAME",
        help="execution provider: pastkey devices lists them (default: that of the export's target)",
    )
    add_provider_settings(device)


def add_provider_settings(group: argparse._ActionsContainer) -> None:
    """Adds the flags of a provider: `provider_options` and `session_options` are pairs, or None."""
    add = group.add_argument
    add("--allow-fallback", action="store_true", help="let the CPU run operators that the provider does not support")
    for flag, name, what in (
        ("--provider-option", "provider_options", "an option of the provider"),
        ("--session-option", "session_options", "an option of the session"),
    ):
        meaning = f"{what}, by onnxruntime's name; may be repeated"
        add(flag, dest=name, metavar="NAME=VALUE", type=key_value, action="append", help=meaning)


def placement_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the values of these flags as arguments of `load`. Raises InputError for options without a provider."""
    if arguments.provider_options and arguments.provider is None:
        raise InputError("--provider-option is for an execution provider: name it with --provider X")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if arguments.threads and cores and arguments.threads > cores:
        say(f"warning: --threads {arguments.threads} is more than the {cores} cores here and slower: leave it out")
    return {
        "providers": (arguments.provider, dict(arguments.provider_options))
        if arguments.provider_options
        else arguments.provider,
        "threads": arguments.threads,
        "allow_fallback": arguments.allow_fallback,
        "session_options": dict(arguments.session_options or ()),
    }


def decode_input(content: bytes) -> str:
    """Decodes standard input. Raises InputError unless it is UTF-8."""
    return decode_text(content, "standard input")


# Characters that move a terminal's cursor or change its state, except line breaks and tabs.
_CONTROL = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n"), ord("\t")}, "\N{REPLACEMENT CHARACTER}")


def say(text: str) -> None:
    """Prints a line of progress or result for a person on standard error: standard output is for the result itself.

    Replaces control characters, which a name in a file may have.
    """
    print(without_control(text), file=sys.stderr, flush=True)


def without_control(text: str) -> str:
    """Returns the text without characters that a terminal would read as commands."""
    return text.translate(_CONTROL)


def print_text(text: str) -> None:
    """Prints a piece of a model's text. On a terminal, replaces control characters, which would be commands to it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # characters that its encoding lacks
    print(text.translate(_CONTROL) if sys.stdout.isatty() else text, end="", flush=True)


on_progress: Callable[[], None] | None = None  # set in the process of an untrusted bundle, whose parent waits for it


def progressed() -> None:
    """Tells that a model is loaded, or has made a token: with --untrusted each has the limit of time."""
    if on_progress is not None:
        on_progress()


def print_table(headings: Sequence[str], *rows: Sequence[str]) -> None:
    """Prints rows below their headings. Figures are to the right; the last column wraps at the terminal's width."""
    rows = tuple([without_control(cell) for cell in row] for row in rows)
    table = [headings, *rows] if any(headings) else rows
    widths = [max(len(row[place]) for row in table) for place in range(len(headings) - 1)]
    right = [all(row[place][:1] in ("", *"0123456789") for row in rows) for place in range(len(widths))]
    for row in table:
        cells = zip(row, widths, right, strict=False)
        line = "  ".join(cell.rjust(width) if figure else cell.ljust(width) for cell, width, figure in cells)
        last = f"{line}  {row[-1]}".rstrip()
        room = shutil.get_terminal_size().columns if sys.stdout.isatty() else len(last)
        hanging: dict[str, Any] = {"initial_indent": line + "  ", "subsequent_indent": " " * (len(line) + 2)}
        wrapped = room < len(last) and room > len(line) + 20
        print(textwrap.fill(row[-1], room, **hanging, break_on_hyphens=False) if wrapped else last)


def print_json(content: Mapping[str, Any]) -> None:
    """Prints the JSON object of --json."""
    print(json.dumps(content, ensure_ascii=False, allow_nan=False), flush=True)

"""Flags that several commands of the runtime share, and the arguments of `load` and of a generation that they make."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

from pastkey.command import add_placement, byte_count, decode_input, finite_float, id_list, key_value, placement_of
from pastkey.errors import InputError
from pastkey.files.folder import read_text

from .. import sandbox
from ..options import FORMS, OPTIONS, Option
from ..settings import CHAT_OPTIONS, ChatOptions

BUNDLE: Final = "a folder that pastkey export wrote"
SOURCE: Final = (
    "a bundle; or a source to export once: ORG/NAME on the Hugging Face Hub, a Hugging Face folder, a .gguf file"
)
ADAPTER: Final = "adapter"  # the name of --adapter's
_TRUSTED: Final = ("adapter_folder", "adapters", "draft_bundle", "draft")  # arguments that no untrusted bundle has
_LIMITS: Final[dict[str, Callable[[str], Any]]] = {"memory": byte_count, "seconds": finite_float}


# --- the bundle ---------------------------------------------------------------------------------------------------
def add_bundle(parser: argparse.ArgumentParser, what: str = BUNDLE) -> None:
    """The bundle; `what` is its help."""
    parser.add_argument("bundle", metavar="BUNDLE", help=what)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where the bundle runs, and the flags of an untrusted one: `untrusted`, and `limits` as pairs, or None."""
    add_placement(parser)
    add = parser.add_argument_group("a bundle that you do not trust").add_argument
    add("--untrusted", action="store_true", help="open it in a child process with limits, on onnxruntime's kernels")
    meaning = "with --untrusted: memory=BYTES, or seconds=S for an answer; repeat for both"
    add("--limit", dest="limits", metavar="NAME=VALUE", type=key_value, action="append", help=meaning)


def limits_of(arguments: argparse.Namespace) -> sandbox.Limits | None:
    """The limits of an untrusted bundle, None for a trusted one. Raises InputError for flags that do not fit."""
    if not arguments.untrusted:
        if arguments.limits:
            raise InputError("--limit is for a bundle that is not trusted: add --untrusted")
        return None
    for name in _TRUSTED:
        if getattr(arguments, name, None):
            flag = "--adapter" if name.startswith("adapter") else "--draft"
            raise InputError(f"{flag} is for a bundle that is trusted: leave it out, or --untrusted")
    if arguments.provider not in (None, "cpu") or arguments.provider_options:
        raise InputError(
            f"--provider {arguments.provider} was given; an untrusted bundle runs on the CPU only: leave it out"
        )
    found: dict[str, Any] = {}
    for name, text in arguments.limits or ():
        try:
            found[name] = _LIMITS[name](text)
        except (KeyError, argparse.ArgumentTypeError):
            raise InputError(
                f"--limit {name}={text} was given; memory=BYTES or seconds=S was expected, as in --limit memory=4e9"
            ) from None
    return sandbox.Limits(**found)


def opening_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Where the bundle runs, and its adapter, as arguments of `load`. Raises InputError."""
    placement, adapter = placement_of(arguments), getattr(arguments, "adapter_folder", None)
    return placement if adapter is None else {**placement, "adapters": {ADAPTER: adapter}}


# --- a generation -------------------------------------------------------------------------------------------------
def add_generation(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """The flags of a generation, a group each. `defaults`: of the command, shown instead of the options' own."""
    for group, options in itertools.groupby(OPTIONS.values(), lambda option: option.group):
        flags = parser.add_argument_group(group)
        flags = flags.add_mutually_exclusive_group() if group == FORMS else flags
        for option in options:
            if option.metavar is not None:
                add_option(flags, option, defaults.get(option.name, option.default))


def add_option(flags: Any, option: Option, default: Any = None) -> None:
    """The flag of an option. Its value is None unless it is given. `default`: is told in its help."""
    told = "" if default in (None, ()) or default is False else f" (default: {'on' if default is True else default})"
    form: dict[str, Any] = {"metavar": option.metavar, "type": partial(_value_of, option)}
    if option.metavar == "":
        form = {"action": argparse.BooleanOptionalAction}
    elif option.valid(["text"]):
        form["action"], told = "extend", "; may be repeated"
    name = option.flag or "--" + option.name.replace("_", "-")
    flags.add_argument(name, dest=option.name, default=None, help=option.help + told, **form)


def _value_of(option: Option, text: str) -> Any:
    """The value that a flag's text is: a number, ids, a text in a list, or a text, by the type of the option."""
    for read in (str,) if option.metavar == "FILE" else (int, float, id_list, lambda one: [one], str):
        with contextlib.suppress(ValueError, argparse.ArgumentTypeError):
            if option.valid(value := read(text)):
                return value
    raise argparse.ArgumentTypeError(f"{text!r} was given; it must be {option.expected}")


def add_draft(group: argparse._ActionsContainer) -> None:
    """The flag of a draft model: `draft_bundle`."""
    what = "smaller bundle of the same vocabulary that drafts tokens"
    group.add_argument("--draft", metavar="BUNDLE", dest="draft_bundle", help=what)


def add_adapter(group: argparse._ActionsContainer) -> None:
    """The flag of a LoRA adapter: `adapter_folder`, which `opening_of` loads and `generation_of` names."""
    what = "LoRA adapter, a folder that peft saved; the bundle was exported with --adapters"
    group.add_argument("--adapter", metavar="FOLDER", dest="adapter_folder", help=what)


def generation_of(arguments: argparse.Namespace) -> ChatOptions:
    """The values of add_generation's flags. Raises InputError for a file that cannot be read."""
    given = {name: value for name in CHAT_OPTIONS if (value := getattr(arguments, name, None)) is not None}
    for name in ("json_schema", "grammar"):
        if name in given:
            given[name] = read_text(Path(given[name]))
    if getattr(arguments, "adapter_folder", None) is not None:
        given["adapter"] = ADAPTER
    return cast(ChatOptions, given)


def prompt_of(text: str) -> str:
    """A prompt as it was given; "-" reads standard input. Raises InputError unless that is UTF-8."""
    return decode_input(sys.stdin.buffer.read()).removesuffix("\n") if text == "-" else text

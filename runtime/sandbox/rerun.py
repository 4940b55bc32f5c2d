"""A whole command in the process of an untrusted bundle: `pastkey inspect BUNDLE --untrusted`."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from pastkey.command import placement_of, say
from pastkey.errors import InputError

from .connection import Connection
from .limits import Limits
from .protocol import Ran

_READ: Final[dict[str, Callable[[str], Any]]] = {"memory": lambda text: int(float(text)), "seconds": float}
_MOST_PRINTED: Final = 10_000_000  # bytes of JSON


def limits_of(arguments: argparse.Namespace) -> Limits:
    """What --limit was set to. Raises InputError."""
    found: dict[str, Any] = {}
    for name, text in arguments.limits or ():
        try:
            found[name] = _READ[name](text)
        except (KeyError, ValueError, OverflowError):
            raise InputError(
                f"--limit {name}={text} was given; memory=BYTES or seconds=S was expected, as in --limit memory=4e9"
            ) from None
    return Limits(**found)


def untrusted_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What --untrusted and --limit were set to, as `load` takes it. Raises InputError."""
    if arguments.untrusted:
        return {"trust": False, "limits": limits_of(arguments)}
    if arguments.limits:
        raise InputError("--limit is for a bundle that is not trusted: add --untrusted")
    return {}


def rerun(name: str, arguments: argparse.Namespace) -> int:
    """Runs a command on the bundle of `arguments` in a process with limits, prints what it printed, returns its status.

    The time of the limits is that of the whole command. It may write to a temporary folder, which is removed.

    Raises:
        UntrustedBundleError: It broke a limit, crashed, or gave no answer.
        PastkeyError: What the command raises.
    """
    limits = limits_of(arguments)
    if getattr(arguments, "provider", None) not in (None, "cpu"):
        raise InputError(
            f"--provider {arguments.provider} was given; an untrusted bundle runs on the processor alone: leave it out"
        )
    placement_of(arguments)  # which refuses options of no provider
    given = {key: value for key, value in vars(arguments).items() if key not in ("untrusted", "limits", "bundle")}
    given |= {"untrusted": False, "limits": None, "provider": "cpu"}
    scratch = Path(tempfile.mkdtemp(prefix="pastkey-"))
    try:
        connection = Connection(Path(arguments.bundle).absolute(), limits, scratch=scratch)
        try:
            ran = connection.call(f"to {name}", "command", Ran, name=name, arguments=given, most_json=_MOST_PRINTED)
            tell_missing(connection.in_force.missing)
        finally:
            connection.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sys.stdout.write(_printable(ran.out))
    sys.stdout.flush()
    sys.stderr.write(_printable(ran.error))
    return ran.status if ran.status in (0, 1) else 2


def tell_missing(missing: Sequence[str]) -> None:
    """Tells which limits this system lacks."""
    if missing:
        say(f"not in force on this system: {', '.join(missing)}")


def _printable(text: str) -> str:
    """Without what a terminal would act on."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)

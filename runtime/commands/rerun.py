"""Whole commands in the process of an untrusted bundle: inspect and bench."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pastkey.command import say
from pastkey.typed import Between

from ..sandbox.connection import Connection, name_of
from ..sandbox.limits import Limits

_MOST_PRINTED: Final = 10_000_000  # bytes of JSON


@dataclass(frozen=True)
class _Ran:
    """What a command printed, and its exit status."""

    status: Annotated[int, Between(0, 255)]
    out: str
    error: str


def rerun(name: str, run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace, limits: Limits) -> int:
    """Runs a command on the bundle of `arguments` in a process with limits, prints what it printed, returns its status.

    The time of the limits is that of the whole command. It may write to a temporary folder, which is removed.

    Raises:
        UntrustedBundleError: It broke a limit, crashed, or gave no answer.
        PastkeyError: What the command raises.
    """
    given = {key: value for key, value in vars(arguments).items() if key not in ("untrusted", "limits", "bundle")}
    given |= {"untrusted": False, "limits": None, "provider": "cpu"}
    asked = {"run": name_of(run), "given": given}
    with (
        tempfile.TemporaryDirectory(prefix="pastkey-", ignore_cleanup_errors=True) as scratch,
        contextlib.closing(Connection(Path(arguments.bundle).absolute(), limits, scratch=Path(scratch))) as connection,
    ):
        ran = connection.run(f"to {name}", run_here, _Ran, asked, most=_MOST_PRINTED)
        tell_missing(connection.in_force.missing)
    sys.stdout.write(_printable(ran.out))
    sys.stdout.flush()
    sys.stderr.write(_printable(ran.error))
    return ran.status if ran.status in (0, 1) else 2


def run_here(path: Path, run: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """In the process: runs a command on the bundle, and gives what it prints."""
    from ..sandbox.server import function_of  # which imports the whole runtime

    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = function_of(run)(argparse.Namespace(**{**given, "bundle": str(path)}))
    return {"status": status, "out": out.getvalue(), "error": error.getvalue()}


def tell_missing(missing: Sequence[str]) -> None:
    """Tells which limits this system lacks."""
    if missing:
        say(f"not in force on this system: {', '.join(missing)}")


def _printable(text: str) -> str:
    """Without what a terminal would act on."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)

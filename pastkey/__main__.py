"""The `pastkey` command: the table of all commands. Imports only the module of the chosen command."""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from pastkey.command import Command, Parser, say
from pastkey.errors import (
    EXTRAS,
    FallbackWarning,
    LimitWarning,
    PastkeyError,
    TemplateWarning,
    first_line,
    missing_extra,
)
from pastkey.files.folder import needs_huggingface
from pastkey.files.reading import is_panic, last_read

TRACEBACK = "PASTKEY_TRACEBACK"  # an environment variable: print the traceback of an unexpected error
# command -> (module, one line of help, an example), by purpose. The module has a Command of the same name.
GROUPS = {
    "make": {
        "train": ("train.cli", "train a decoder on text", "train --data book.txt --out checkpoint"),
        "export": (
            "export.cli",
            "export a decoder to a bundle: ONNX with a KV cache",
            "export checkpoint --out bundle",
        ),
        "compile": (
            "runtime.commands.compile",
            "compile a bundle of static graphs for one device, for a fast load",
            "compile bundle --provider qnn --out compiled",
        ),
        "web": ("web.command", "write a page that runs a bundle in a browser", "web bundle --out page"),
        "sign": ("runtime.commands.sign", "sign a bundle with your key", "sign bundle --key private.pem"),
    },
    "use": {
        "run": ("runtime.commands.run", "generate text", 'run bundle --prompt "Once upon a time"'),
        "chat": ("runtime.commands.chat", "hold a conversation", "chat bundle"),
        "batch": (
            "runtime.commands.batch",
            "answer a file of prompts, and continue after a stop",
            "batch bundle rows.jsonl --out answers.jsonl",
        ),
        "serve": ("serve.command", "answer OpenAI clients over HTTP", "serve bundle --port 8000"),
    },
    "look": {
        "see": (
            "see.cli",
            "show on a page what happens inside a decoder",
            'see bundle --prompt "The cat sat" --out page.html',
        ),
        "inspect": (
            "runtime.commands.inspection",
            "show the sizes, operators and devices of a bundle",
            "inspect bundle",
        ),
        "bench": ("runtime.commands.bench", "measure prefill and decode speed of a bundle", "bench bundle"),
        "devices": ("runtime.commands.devices", "list the execution providers of this machine", "devices"),
    },
    "check": {
        "verify": (
            "export.cli",
            "compare a bundle with its source, or with its own uncached run",
            "verify bundle checkpoint",
        ),
        "eval": (
            "export.cli",
            "measure perplexity on a text, and the KL divergence from a reference",
            "eval int8 --text book.txt --reference float32",
        ),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
_FLAGS = ("--help", "--version")
EXPORTING = ("run", "chat", "see")  # they also accept a source, and export it once


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 success, 1 a difference or rows that all fail, 2 a mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may not be valid text
            stream.reconfigure(errors="backslashreplace")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        import pastkey

        print(f"pastkey {pastkey.__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, [*COMMANDS, *_FLAGS], 1)
        meant = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        return _fail(f"no command {name!r}; {meant}", "pastkey")
    prog = f"pastkey {name}"
    module, summary, example = COMMANDS[name]

    def work() -> int:
        try:
            command: Command = getattr(importlib.import_module(f"pastkey.{module}"), f"{name}_command")
            parser = Parser(prog=prog, description=summary[0].upper() + summary[1:] + ".")
            command.add_arguments(parser)
            parser.add_argument_group("example", f"pastkey {example}")
            given = parser.parse_args(rest)
            if name == "chat":
                importlib.import_module("jinja2")  # a user without it is told before an export of minutes
            if name in EXPORTING and needs_huggingface(given.bundle):
                from pastkey.exported import exported

                chats = name == "chat" and given.template is None
                given.bundle = exported(given.bundle, untrusted=getattr(given, "untrusted", False), chats=chats)
            if not module.startswith(("train", "export", "see")):  # numpy's BLAS would start a thread for each core
                os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
            return command.run(given)
        except ModuleNotFoundError as error:
            source = ["huggingface"] if name == "export" and any(map(needs_huggingface, rest)) else []
            raise missing_extra(error, name if name in EXTRAS else module.partition(".")[0], *source) from None

    return guarded(work, prog)


def guarded(work: Callable[[], int], prog: str) -> int:
    """Runs a command's work and returns its exit status: an error is one sentence, which begins with `prog`."""
    try:
        with _cleaning_up_when_terminated(), _warnings_as_sentences(prog):
            status = work()
        sys.stdout.flush()
        return status
    except PastkeyError as error:
        return _fail(str(error), prog)
    except BrokenPipeError:
        # The reader closed the pipe (| head): print nothing, and silence the interpreter's own flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return _fail("interrupted", prog, status=130)
    except MemoryError:
        return _fail("not enough memory: close other programs, or use a smaller model or context", prog)
    except OSError as error:
        return _fail(_os_sentence(error), prog)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):  # SystemExit
            raise
        return _fail(_last_resort(error), prog)


def _open_what_is_closed() -> None:
    """Opens the null device for a standard stream that a shell closed (1>&-): the next file would get its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            file = os.open(os.devnull, os.O_RDWR)
            if file != number:
                os.dup2(file, number)
                os.close(file)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))


class _TerminatedError(SystemExit):
    """A signal asked the command to end."""


@contextlib.contextmanager
def _cleaning_up_when_terminated() -> Iterator[None]:
    """Ends the command by an exception on SIGTERM, and on SIGHUP when its terminal is closed, as Ctrl-C does.

    So partial files are removed. An ignored SIGHUP, as under nohup, stays ignored. Python drops an exception that is
    raised inside a finalizer or a weak reference's callback: then the signal is sent again.
    """
    numbers = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)

    ending, main = False, threading.get_ident()

    def end(number: int, _: FrameType | None) -> None:
        nonlocal ending
        if not ending:  # another signal would interrupt the removal
            ending = True
            raise _TerminatedError(128 + number)

    def again(number: int) -> None:
        nonlocal ending
        ending = False
        signal.pthread_kill(main, number)

    def dropped(unraisable: sys.UnraisableHookArgs) -> None:
        if isinstance(unraisable.exc_value, _TerminatedError):  # a signal during this hook would be dropped as well
            threading.Timer(0.01, again, [unraisable.exc_value.args[0] - 128]).start()
        else:
            hook(unraisable)

    if threading.current_thread() is not threading.main_thread():  # Python handles signals only in that thread
        yield
        return
    before = {number: signal.signal(number, end) for number in numbers}
    hook, sys.unraisablehook = sys.unraisablehook, dropped
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            if signal.getsignal(number) is end and not ending:  # otherwise the command ends now, and says why
                signal.signal(number, handler)


@contextlib.contextmanager
def _warnings_as_sentences(prog: str) -> Iterator[None]:
    """Shows the warnings of pastkey as one line each, and every other warning as Python does."""
    with warnings.catch_warnings():
        warnings.simplefilter("once", FallbackWarning)  # a command may open several graphs
        warnings.simplefilter("always", LimitWarning)
        warnings.simplefilter("always", TemplateWarning)
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, FallbackWarning | LimitWarning | TemplateWarning):
                say(f"{prog}: {message}")
            else:
                shown(message, category, *where, **more)

        warnings.showwarning = show
        yield


def _overview() -> str:
    lines = ["usage: pastkey COMMAND [options]"]
    for heading, group in GROUPS.items():
        lines += ["", f"{heading}:", *(f"  {name:<9} {summary}" for name, (_, summary, _) in group.items())]
        lines.append(f"  example:  pastkey {next(iter(group.values()))[-1]}")
    return "\n".join([*lines, "", "pastkey COMMAND --help shows the options of one, pastkey --version the version."])


def _os_sentence(error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    name = (full and error.filename2) or error.filename  # the second is a copy's target
    where = f": {name}" if name else ""
    if full:
        return f"the disk is full{where}; nothing half-written was kept: free some space and try again"
    return f"{error.strerror or error}{where}"


def _last_resort(error: BaseException) -> str:
    """Returns the sentence for an unexpected exception. A damaged file is likely; status 1 would mean a difference."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"
    read = last_read()
    damaged = "" if read is None else f" after reading {read}, which may be damaged: copy it again"
    return (
        f"stopped by a fault ({first_line(error)}; {place}){damaged}; if it happens again, set {TRACEBACK}=1 and "
        "report its output"
    )


def _fail(sentence: str, prog: str, status: int = 2) -> int:
    say(f"{prog}: {' '.join(sentence.splitlines())}")
    return status


if __name__ == "__main__":
    sys.exit(main())

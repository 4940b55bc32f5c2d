"""A conversation on standard input and output: questions line by line, each answer as it comes."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Unpack

from pastkey.command import decode_input, say
from pastkey.errors import InputError

from ..chat import Chat
from ..settings import ChatOptions


def converse(chat: Chat, **options: Unpack[ChatOptions]) -> None:
    """Answers each line of standard input, until it ends or /exit; /reset begins a new conversation.

    At a terminal it asks, an error is told and may be mended by the next line, and Ctrl-C stops an answer; from a pipe
    an error is the end. `options` are those of `Chat.stream`.
    """
    if not sys.stdin.isatty():
        for line in _questions(_piped_lines(), chat):
            print_answer(chat, line, **options)
        return
    say("/reset begins a new conversation, Ctrl-C stops an answer, /exit or Ctrl-D ends.")
    for line in _questions(_typed_lines(), chat):
        try:
            with interruptions() as interrupted:
                print_answer(chat, line, interrupted, **options)
        except InputError as error:
            say(str(error))


def print_answer(
    chat: Chat, text: str, interrupted: threading.Event | None = None, **options: Unpack[ChatOptions]
) -> None:
    """Prints the answer to `text` as it comes, as far as it came when `interrupted` is set."""
    for chunk in chat.stream(text, **options):
        print(chunk.text, end="", flush=True)
        if interrupted is not None and interrupted.is_set():
            break
    print(flush=True)


@contextlib.contextmanager
def interruptions() -> Iterator[threading.Event]:
    """Inside, a first Ctrl-C sets the event and no more: an answer ends between two tokens, with its cache whole.

    A second one interrupts as always.
    """
    pressed = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if pressed.is_set():
            signal.default_int_handler(number, frame)
        pressed.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _questions(lines: Iterable[str], chat: Chat) -> Iterator[str]:
    """The lines that are meant for the model; the others are acted on here."""
    for line in lines:
        word = line.strip()
        if word == "/exit":
            return
        if word == "/reset":
            chat.reset()
        elif word:
            yield line


def _piped_lines() -> Iterator[str]:
    for line in sys.stdin.buffer:
        yield decode_input(line).rstrip("\r\n")


def _typed_lines() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it gives `input` editing and a history
    while True:
        try:
            # Without a terminal to write on, a prompt would stand between the answers.
            line = input("> " if sys.stdout.isatty() else "")
        except UnicodeDecodeError:
            say("this line is not valid in the terminal's encoding: type it again")
            continue
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield line

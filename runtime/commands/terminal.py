"""A conversation on standard input and output: questions line by line, each answer as it comes."""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Unpack

from pastkey.command import decode_input, print_text, progressed, say
from pastkey.errors import InputError, PastkeyError

from ..decoding.completion import Completion
from ..model.chat.chat import Chat
from ..settings import ChatOptions

HELP = '''/help          shows this
/save FILE     writes the conversation to a file, as JSON
/load FILE     continues a saved conversation
/undo          removes the last question and its answer
/drop          removes the oldest question and its answer
/system TEXT   changes the system text
/reset         begins a new conversation
/exit          ends; so does Ctrl-D
"""            begins and ends a question of several lines
//TEXT         asks /TEXT
Ctrl-C stops an answer.'''
_COMMAND = re.compile(r"\s*(/[a-zA-Z]+)(?:\s+(.*?))?\s*", re.DOTALL)
_QUOTES = '"""'


def converse(chat: Chat, **options: Unpack[ChatOptions]) -> None:
    """Answers each line of standard input, until it ends or /exit; /help lists the other commands.

    At a terminal it asks, an error is told and may be mended by the next line, and Ctrl-C stops an answer, or where
    there is none asks whether to end; from a pipe an error is the end. `options` are those of `Chat.stream`.
    """
    if not sys.stdin.isatty():
        for piped in _questions(_piped_lines(), chat):
            print_answer(chat, piped, **options)
        return
    say("/help lists the commands, Ctrl-C stops an answer, /exit or Ctrl-D ends.")
    pressed = threading.Event()  # Ctrl-C, with no answer to stop, and nothing typed since
    while True:
        try:
            question = next(_questions(_typed_lines(pressed), chat), None)
            if question is None:
                return
            with interruptions() as interrupted:
                answer = print_answer(chat, question, interrupted, **options)
            _tell_a_full_context(chat, answer)
        except KeyboardInterrupt:
            print()
            if pressed.is_set():
                return
            pressed.set()
            say("Ctrl-C once more ends, and the conversation is lost: /save FILE keeps it.")
        except PastkeyError as error:
            say(str(error))


def print_answer(
    chat: Chat, text: str, interrupted: threading.Event | None = None, **options: Unpack[ChatOptions]
) -> Completion | None:
    """Prints the answer to `text` as it comes, until it ends or `interrupted` is set. Returns the printed text."""
    with chat.stream(text, **options) as answer:
        for chunk in answer:
            progressed()
            print_text(chunk.text)
            if interrupted is not None and interrupted.is_set():
                break
    print(flush=True)
    return answer.completion


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


def _tell_a_full_context(chat: Chat, answer: Completion | None) -> None:
    context = chat.model.parts.manifest.context_length
    if answer is None or answer.finish_reason != "length":
        return
    if answer.prompt_tokens + answer.new_tokens >= context:
        say(f"the answer ends here, since the context of {context} tokens is full: /drop removes the oldest question")


# --- questions and commands ---------------------------------------------------------------------------------------
def _questions(lines: Iterator[str], chat: Chat) -> Iterator[str]:
    """The questions to the model: lines, and several between quotes. Commands are executed here."""
    for line in lines:
        if line.lstrip().startswith(_QUOTES):
            yield _quoted(line, lines)
        elif line.lstrip().startswith("//"):
            yield line.replace("//", "/", 1)
        elif found := _COMMAND.fullmatch(line):
            if found[1] == "/exit":
                return
            _act(found[1], found[2] or "", chat)
        elif line.strip():
            yield line


def _quoted(line: str, lines: Iterable[str]) -> str:
    """The text from the quotes that begin `line` to those that end it, or one of `lines`."""
    taken: list[str] = []
    for part in itertools.chain([line.lstrip().removeprefix(_QUOTES)], lines):
        ends = part.rstrip().endswith(_QUOTES)
        taken.append(part.rstrip().removesuffix(_QUOTES) if ends else part)
        if ends:
            return "\n".join(taken).strip("\n")
    raise InputError(f"the question that {_QUOTES} began has no end: end it with {_QUOTES}")


def _act(name: str, argument: str, chat: Chat) -> None:
    """The action of a command. Raises InputError for one that does not exist, or that lacks its argument."""
    alone: dict[str, Callable[[], None]] = {"/reset": chat.reset, "/undo": chat.undo, "/drop": chat.drop}
    named: dict[str, Callable[[Path], None]] = {"/save": chat.save, "/load": chat.load}
    if name == "/help":
        say(HELP)
    elif name in alone and not argument:
        alone[name]()
    elif name in named:
        if not argument:
            raise InputError(f"{name} needs the name of a file: {name} FILE")
        try:
            named[name](Path(argument).expanduser())
        except PastkeyError:
            raise
        except (OSError, RuntimeError) as error:  # a disk that is full, a home that is not there
            raise InputError(f"{name} {argument} cannot be done: {getattr(error, 'strerror', None) or error}") from None
        say(f"{argument}: {len(chat.messages)} messages")
    elif name == "/system":
        if argument:
            chat.set_system(argument)
        else:
            say("there is no system text: /system TEXT gives one" if chat.system is None else chat.system)
    elif name in alone:
        raise InputError(f"{name} has no argument: leave {argument!r:.60} out, or ask the model with /{name} ...")
    else:
        raise InputError(
            f"there is no command {name}: /help lists them, and //... asks the model a text that begins with /"
        )


def _piped_lines() -> Iterator[str]:
    for line in sys.stdin.buffer:
        yield decode_input(line).rstrip("\r\n")


def _typed_lines(pressed: threading.Event) -> Iterator[str]:
    """The typed lines. Each clears the event."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it gives `input` editing and a history
    while True:
        try:
            # Without a terminal to write on, a prompt would be printed between the answers.
            line = input("> " if sys.stdout.isatty() else "")
        except UnicodeDecodeError:
            say("this line is not valid in the terminal's encoding: type it again")
            continue
        except EOFError:
            print()
            return
        pressed.clear()
        yield line

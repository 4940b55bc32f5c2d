"""`pastkey chat` as it is used: from a pipe, for one question, and at a terminal."""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pastkey.runtime import Chunk, Stream
from pastkey.runtime.commands import terminal
from pastkey.runtime.commands.terminal import interruptions, print_answer

from .conftest import FLAGS, SETTINGS, fails


# --- from a pipe --------------------------------------------------------------------------------------------------
def test_each_line_of_a_pipe_is_answered_in_one_conversation(talking, model, piped):
    conversation = model.chat("be brief")
    expected = [conversation.ask(text, **SETTINGS).text for text in ("abc", "é日")]
    given = "abc\r\n\n  \né日\n/exit\nabc\n".encode()
    found = piped(given, "chat", talking, "--system", "be brief", *FLAGS)
    assert found == (0, "".join(text + "\n" for text in expected), "")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (b"what?\nabc\n", ["no token covers", "what?"]),
        (b"a\xff\n", ["standard input is not UTF-8 text"]),
        (b"a" * 700, ["the conversation has 718 tokens; the context is 600", "/reset", "/drop"]),
        (b"/undo", ["there is no question to take back"]),
        (b"/save", ["/save needs the name of a file: /save FILE"]),
        (b"/load none.json", ["none.json is missing"]),
        (b"/save none/talk.json", ["/save none/talk.json cannot be done: No such file or directory"]),
        (b"/helo", ["there is no command /helo", "/help lists them", "//"]),
        (b"/reset now", ["/reset stands alone: leave 'now' out, or ask the model with //reset"]),
        (b'"""abc', ["has no end"]),
    ],
)
def test_an_error_in_a_pipe_ends_it(talking, piped, given, words):
    fails(piped(given, "chat", talking, *FLAGS), *words)


# --- commands -----------------------------------------------------------------------------------------------------
def test_commands_act_on_the_conversation(talking, model, tmp_path, piped):
    conversation = model.chat("be brief")
    expected = [conversation.ask("abc", **SETTINGS).text]
    expected.append(conversation.ask("de", **SETTINGS).text)
    conversation.undo()
    expected.append(conversation.ask("x   y", **SETTINGS).text)
    conversation.drop()
    conversation.set_system("be long")
    file = tmp_path / "my talk.json"
    given = f"abc\nde\n/undo\nx   y\n/drop\n/system be long\n/save {file}\n/reset\n/load {file}\nde\n"
    expected.append(conversation.ask("de", **SETTINGS).text)
    status, out, err = piped(given.encode(), "chat", talking, "--system", "be brief", *FLAGS)
    assert (status, out) == (0, "".join(text + "\n" for text in expected))
    assert err == f"{file}: 3 messages\n" * 2
    assert json.loads(file.read_text(encoding="utf-8")) == {"messages": conversation.messages[:3]}


def test_a_question_of_several_lines(model, monkeypatch, capsys):
    asked: list[str] = []
    monkeypatch.setattr(terminal, "print_answer", lambda chat, text, *_, **__: asked.append(text))
    lines = '"""\none\n\n  two\n"""\n"""three"""\n  """four\nfive"""\n//help me\n/usr/bin is a folder\n a/b\n/help\n'
    monkeypatch.setattr(terminal, "_piped_lines", lambda: iter(lines.splitlines()))
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    terminal.converse(model.chat())
    assert asked == ["one\n\n  two", "three", "four\nfive", "/help me", "/usr/bin is a folder", " a/b"]
    assert capsys.readouterr().err == terminal.HELP + "\n"


def test_a_system_text_is_shown(model, capsys):
    terminal._act("/system", "", model.chat("be brief"))
    terminal._act("/system", "", model.chat())
    assert capsys.readouterr().err == "be brief\nthere is no system text: /system TEXT gives one\n"


def test_an_answer_that_fills_the_context_says_so(model, capsys):
    chat = model.chat()
    terminal._tell_a_full_context(chat, chat.ask("a", max_new_tokens=4))
    assert capsys.readouterr().err == ""
    terminal._tell_a_full_context(chat, chat.ask("a" * 540, max_new_tokens=100))
    assert "the context of 600 tokens is full: /drop lets the oldest question go" in capsys.readouterr().err


# --- interrupts ---------------------------------------------------------------------------------------------------
def test_an_interrupt_ends_an_answer_and_keeps_it(model, capsys, monkeypatch):
    whole = model.chat().ask("abc", **SETTINGS).text
    step, steps = Stream.__next__, itertools.count()

    def interrupted_after_three(stream: Stream) -> Chunk:
        if next(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(stream)

    conversation = model.chat()
    with monkeypatch.context() as patch, interruptions() as interrupted:
        patch.setattr(Stream, "__next__", interrupted_after_three)
        print_answer(conversation, "abc", interrupted, **SETTINGS)
    assert capsys.readouterr().out == whole[:3] + "\n"
    assert conversation.messages[-1] == {"role": "assistant", "content": whole[:3]}
    # The cache of what was said is whole: all of it is found again, but the letter that was not fed.
    following = conversation.ask("b", **SETTINGS)
    assert following.cached_tokens == len("<user>abc.<assistant>") + 2


def test_a_second_interrupt_is_one_as_always():
    before = signal.getsignal(signal.SIGINT)
    with interruptions() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert interrupted.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# --- at a terminal ------------------------------------------------------------------------------------------------
class Terminal:
    """`pastkey chat` on a terminal of its own."""

    def __init__(self, bundle: Path) -> None:
        import pty

        self.ours, theirs = pty.openpty()
        # Tests that run in the background of a shell, as in CI, hand on that Ctrl-C is ignored.
        code = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from pastkey.__main__ import main; sys.exit(main(sys.argv[1:]))"
        )
        program = [sys.executable, "-c", code, "chat", str(bundle), "--threads", "1", *FLAGS]
        environment = os.environ | {"TERM": "dumb", "INPUTRC": os.devnull}
        self.process = subprocess.Popen(
            program, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        self.seen = ""

    def until(self, text: str) -> str:
        """What was shown up to and with `text`, since the last time."""
        end = time.monotonic() + 60
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} did not come after {self.seen!r}"
            if select.select([self.ours], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.ours, 4096).decode()
                except OSError:  # Linux's way of saying that the other side is closed
                    raise AssertionError(f"{text!r} did not come; the end was {self.seen!r}") from None
        place = self.seen.index(text) + len(text)
        shown, self.seen = self.seen[:place], self.seen[place:]
        return shown

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def press(self) -> None:
        """Ctrl-C, once readline waits for input."""
        time.sleep(0.5)
        self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """The exit status."""
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process.kill()
            os.close(self.ours)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize("ending", ["Ctrl-D", "Ctrl-C"])
def test_at_a_terminal(talking, model, tmp_path, ending):
    conversation = model.chat()
    expected = [conversation.ask(text, **SETTINGS).text for text in ("abc", "de")]
    typed = Terminal(talking)
    typed.until("/help lists the commands, Ctrl-C stops an answer, /exit or Ctrl-D ends.")
    typed.until("> ")
    typed.type("abc\n")
    assert expected[0] in typed.until("\n> ")
    typed.type("what?\n")  # told, and no end
    assert "no token covers" in typed.until("\n> ")
    typed.type("de\n")
    assert expected[1] in typed.until("\n> ")
    if ending == "Ctrl-D":
        typed.type("\x04")
    else:
        typed.press()
        typed.until("Ctrl-C once more ends, and the conversation is lost: /save FILE keeps it.")
        typed.until("> ")
        typed.type(f"/save {tmp_path / 'talk.json'}\n")
        typed.until("4 messages")
        typed.until("> ")
        typed.press()  # what was typed was an answer to the first
        typed.until("Ctrl-C once more ends")
        typed.until("> ")
        typed.press()
    assert typed.end() == 0
    assert (tmp_path / "talk.json").exists() == (ending == "Ctrl-C")

"""`pastkey chat` as it is used: from a pipe, for one question, and at a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer

from pastkey.bundle import Bundle
from pastkey.runtime import LanguageModel, load
from pastkey.runtime.commands.terminal import interruptions, print_answer

if TYPE_CHECKING:
    from ..conftest import Tiny

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}.{% endfor %}<assistant>"
FLAGS = ["--max-new-tokens", "7", "--temperature", "1", "--seed", "1"]
SETTINGS: dict[str, Any] = {"max_new_tokens": 7, "temperature": 1.0, "seed": 1}


@pytest.fixture(scope="module")
def talking(tiny: Tiny, letters: Tokenizer, make_bundle: Callable[..., Bundle]) -> Path:
    """A bundle with a chat template."""
    return make_bundle(tiny, "fused", tokenizer=letters, tokenizer_config={"chat_template": TEMPLATE}).path


@pytest.fixture(scope="module")
def model(talking: Path) -> LanguageModel:
    return load(talking, threads=1)


def chat(bundle: Path, *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    program = [sys.executable, "-m", "pastkey", "chat", str(bundle), "--threads", "1", *arguments]
    return subprocess.run(program, input=given, capture_output=True, check=False)


def fails(done: subprocess.CompletedProcess[bytes], *words: str) -> None:
    assert done.returncode == 2
    sentence = done.stderr.decode()
    assert sentence.count("\n") == 1
    for word in words:
        assert word in sentence


# --- from a pipe --------------------------------------------------------------------------------------------------
def test_each_line_of_a_pipe_is_answered_in_one_conversation(talking: Path, model: LanguageModel) -> None:
    conversation = model.chat("be brief")
    expected = [conversation.ask(text, **SETTINGS).text for text in ("abc", "é日")]
    done = chat(talking, "--system", "be brief", *FLAGS, given="abc\r\n\n  \né日".encode())
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == "".join(text + "\n" for text in expected)


def test_reset_and_exit(talking: Path, model: LanguageModel) -> None:
    first = model.chat().ask("abc", **SETTINGS).text
    done = chat(talking, *FLAGS, given=b"abc\n /reset \nabc\n/exit\nabc\n")
    assert (done.returncode, done.stdout.decode()) == (0, f"{first}\n{first}\n")


def test_an_error_in_a_pipe_ends_it(talking: Path) -> None:
    done = chat(talking, *FLAGS, given=b"what?\nabc\n")
    fails(done, "no token covers", "what?")
    assert done.stdout == b""
    fails(chat(talking, given=b"a\xff\n"), "standard input is not UTF-8 text")
    fails(chat(talking, given=b"a" * 700), "the conversation has 718 tokens; the context is 600", "/reset")


# --- one question -------------------------------------------------------------------------------------------------
def test_one_question(talking: Path, model: LanguageModel) -> None:
    answer = model.chat("be brief").ask("abc", **SETTINGS)
    arguments = ["--system", "be brief", "--prompt", "abc", *FLAGS]
    done = chat(talking, *arguments)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, answer.text + "\n", b"")
    assert chat(talking, *arguments[:2], "--prompt", "-", *FLAGS, given=b"abc\n").stdout == done.stdout
    found = json.loads(chat(talking, *arguments, "--json").stdout)
    seconds = found.pop("seconds")
    assert seconds > 0
    assert found == {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "abc"},
            {"role": "assistant", "content": answer.text},
        ],
        "text": answer.text,
        "ids": answer.ids,
        "finish_reason": "length",
        "prompt_tokens": len("<system>be brief.<user>abc.<assistant>"),
        "cached_tokens": 0,
        "new_tokens": 7,
    }


def test_another_template(talking: Path, model: LanguageModel, tmp_path: Path) -> None:
    other = tmp_path / "other.jinja"
    other.write_text("{% for m in messages %}{{ m.content }}é{% endfor %}", encoding="utf-8")
    answer = model.chat(template=other).ask("abc", **SETTINGS)
    assert answer.ids == model.generate("abcé", **SETTINGS).ids != model.chat().ask("abc", **SETTINGS).ids
    done = chat(talking, "--template", str(other), "--prompt", "abc", "--no-prompt-lookup", *FLAGS)
    assert (done.returncode, done.stdout.decode()) == (0, answer.text + "\n")
    missing = str(tmp_path / "none")
    fails(chat(talking, "--template", missing, "--prompt", "a"), f"no such file: {missing}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--json"], ["--json holds the answer to one question", "--prompt TEXT"]),
        (["--prompt", "what?"], ["no token covers"]),
        (["--prompt", "a", "--temperature", "-1"], ["temperature is -1.0"]),
        (["--temperature", "-1"], ["temperature is -1.0"]),
        (["--provider", "cuda9"], ["'cuda9' is unknown"]),
        (["--colour"], ["--colour"]),
    ],
)
def test_bad_input(talking: Path, arguments: list[str], words: list[str]) -> None:
    fails(chat(talking, *arguments), *words)


def test_a_bundle_that_cannot_chat_says_so_at_once(speaking_bundle: Bundle, bundle: Bundle) -> None:
    fails(chat(speaking_bundle.path), "has no chat template", "pastkey run")
    fails(chat(bundle.path), "has no tokenizer", "--prompt-ids")


def test_without_jinja2_it_is_named(talking: Path) -> None:
    program = (
        "import sys\nsys.modules['jinja2'] = None\nfrom pastkey.__main__ import main\n"
        f"sys.exit(main(['chat', {str(talking)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], input=b"", capture_output=True, check=False)
    fails(done, "type pip install jinja2 and try again")


# --- interrupts ---------------------------------------------------------------------------------------------------
def test_an_interrupt_ends_an_answer_and_keeps_it(
    model: LanguageModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model.chat().ask("abc", **SETTINGS).text
    stream = LanguageModel.stream

    def interrupted_after_three(*arguments: Any, **settings: Any) -> Generator[Any, None, None]:
        for count, chunk in enumerate(stream(*arguments, **settings)):
            if count == 2:
                signal.raise_signal(signal.SIGINT)
            yield chunk

    conversation = model.chat()
    with monkeypatch.context() as patch, interruptions() as interrupted:
        patch.setattr(LanguageModel, "stream", interrupted_after_three)
        print_answer(conversation, "abc", interrupted, **SETTINGS)
    assert capsys.readouterr().out == whole[:3] + "\n"
    assert conversation.messages[-1] == {"role": "assistant", "content": whole[:3]}
    # The cache of what was said is whole: all of it is found again, but the letter that was not fed.
    following = conversation.ask("b", **SETTINGS)
    assert following.reused_tokens == len("<user>abc.<assistant>") + 2


def test_a_second_interrupt_is_one_as_always() -> None:
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

    def interrupt(self) -> None:
        """Ctrl-C until it ends: one that comes just before readline waits for input is seen with the next."""
        for _ in range(30):
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=2)
                return

    def end(self) -> int:
        """The exit status."""
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process.kill()
            os.close(self.ours)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize("ending", ["/exit\n", "\x04", "interrupt"])
def test_at_a_terminal(talking: Path, model: LanguageModel, ending: str) -> None:
    conversation = model.chat()
    expected = [conversation.ask(text, **SETTINGS).text for text in ("abc", "de")]
    terminal = Terminal(talking)
    terminal.until("/exit or Ctrl-D ends.")
    terminal.until("> ")
    terminal.type("abc\n")
    assert expected[0] in terminal.until("\n> ")
    terminal.type("what?\n")  # told, and no end
    assert "no token covers" in terminal.until("\n> ")
    terminal.type("de\n")
    assert expected[1] in terminal.until("\n> ")
    terminal.type("/reset\n")
    terminal.until("> ")
    terminal.type("abc\n")
    assert expected[0] in terminal.until("\n> ")
    if ending == "interrupt":
        terminal.interrupt()
    else:
        terminal.type(ending)
    assert terminal.end() == 0

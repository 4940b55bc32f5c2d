"""`pastkey chat` as it is used: for one question, from a pipe, and at a terminal."""

import itertools
import json
import signal
import sys

import pytest

from pastkey.runtime import Stream, load
from pastkey.runtime.commands import terminal
from pastkey.runtime.commands.terminal import interruptions, print_answer

from ..conftest import TEMPLATE
from .conftest import FLAGS, SETTINGS, Terminal, fails

AUTHORS = "from the model's generation_config.json: temperature 1.3, top_k 9 (--temperature 0 chooses the likeli"
DRAWN = [
    ((), {"temperature": 1.3, "top_k": 9}, AUTHORS),
    (("--temperature", "0.5", "--top-k", "0"), {"temperature": 0.5}, ""),
    (("--temperature", "0"), {}, ""),
]


@pytest.mark.parametrize(("flags", "settings", "said"), DRAWN)
def test_tokens_are_drawn_as_the_models_authors_set_it(tiny, letters, make_bundle, piped, flags, settings, said):
    own = {"do_sample": True, "temperature": 1.3, "top_k": 9, "top_p": 1.0}
    config = {"chat_template": TEMPLATE}
    made = make_bundle(tiny, "fused", tokenizer=letters, tokenizer_config=config, generation_config=own)
    answer = load(made.path, threads=1).chat().ask("abc", max_new_tokens=7, seed=1, **settings).text
    status, out, err = piped(b"abc\n", "chat", made.path, "--max-new-tokens", "7", "--seed", "1", *flags)
    assert (status, out, err[: len(AUTHORS)]) == (0, answer + "\n", said)


def test_one_question(talking, model, command, piped):
    answer = model.chat("be brief").ask("abc", **SETTINGS)
    arguments = ("chat", talking, "--system", "be brief", *FLAGS, "--prompt")
    assert command(*arguments, "abc") == (0, answer.text + "\n", "")
    assert piped(b"abc\n", *arguments, "-") == (0, answer.text + "\n", "")
    found = json.loads(command(*arguments, "abc", "--json")[1])
    assert found.pop("seconds") > 0
    said = (("system", "be brief"), ("user", "abc"), ("assistant", answer.text))
    assert found == {
        "messages": [{"role": role, "content": content} for role, content in said], "text": answer.text,
        "ids": answer.ids, "finish_reason": "length", "stop_string": None, "cached_tokens": 0, "new_tokens": 7,
        "prompt_tokens": len("<system>be brief.<user>abc.<assistant>"),
    }  # fmt: skip


def test_another_template(talking, model, tmp_path, command):
    other = tmp_path / "other.jinja"
    other.write_text("{% for m in messages %}{{ m.content }}é{% endfor %}", encoding="utf-8")
    answer = model.generate("abcé", **SETTINGS)
    assert answer.ids != model.chat().ask("abc", **SETTINGS).ids
    status, out, _ = command("chat", talking, "--template", other, "--prompt", "abc", "--no-prompt-lookup", *FLAGS)
    assert (status, out) == (0, answer.text + "\n")


# --- from a pipe --------------------------------------------------------------------------------------------------
def test_each_line_of_a_pipe_is_answered_in_one_conversation(talking, model, piped):
    conversation = model.chat("be brief")
    expected = [conversation.ask(text, **SETTINGS).text for text in ("abc", "é日")]
    given = "abc\r\n\n  \né日\n/exit\nabc\n".encode()
    found = piped(given, "chat", talking, "--system", "be brief", *FLAGS)
    assert found == (0, "".join(text + "\n" for text in expected), "")


REFUSED = {
    b"what?\nabc\n": "no token covers",
    b"a\xff\n": "standard input is not UTF-8 text",
    b"a" * 700: "the conversation has 718 tokens; the context is 600",
    b"/undo": "there is no question to undo",
    b"/save": "/save needs the name of a file: /save FILE",
    b"/load none.json": "none.json is missing",
    b"/save none/talk.json": "/save none/talk.json cannot be done: No such file or directory",
    b"/helo": "there is no command /helo",
    b"/reset now": "/reset has no argument: leave 'now' out, or ask the model with //reset",
    b'"""abc': "has no end",
}


@pytest.mark.parametrize("given", REFUSED, ids=REFUSED.values())
def test_an_error_in_a_pipe_ends_it(talking, piped, given):
    fails(piped(given, "chat", talking, *FLAGS), REFUSED[given])


def test_commands_act_on_the_conversation(talking, model, tmp_path, piped):
    conversation = model.chat("be brief")
    expected = [conversation.ask(text, **SETTINGS).text for text in ("abc", "de")]
    conversation.undo()
    expected.append(conversation.ask("x   y", **SETTINGS).text)
    conversation.drop()
    conversation.set_system("be long")
    expected.append(conversation.ask("de", **SETTINGS).text)
    file = tmp_path / "my talk.json"
    given = f"abc\nde\n/undo\nx   y\n/drop\n/system be long\n/save {file}\n/reset\n/load {file}\n/system\nde\n"
    status, out, err = piped(given.encode(), "chat", talking, "--system", "be brief", *FLAGS)
    assert (status, out) == (0, "".join(text + "\n" for text in expected))
    assert err == f"{file}: 3 messages\n" * 2 + "be long\n"
    assert json.loads(file.read_text(encoding="utf-8")) == {"messages": conversation.messages[:3]}


def test_a_question_of_several_lines(talking, piped, monkeypatch):
    asked = []
    monkeypatch.setattr(terminal, "print_answer", lambda chat, text, *_, **__: asked.append(text))
    lines = '"""\none\n\n  two\n"""\n"""three"""\n  """four\nfive"""\n//help me\n/usr/bin is a folder\n a/b\n/help\n'
    _, _, err = piped(f"{lines}/system\n".encode(), "chat", talking)
    assert asked == ["one\n\n  two", "three", "four\nfive", "/help me", "/usr/bin is a folder", " a/b"]
    assert err == terminal.HELP + "\nthere is no system text: /system TEXT gives one\n"


def test_an_answer_that_fills_the_context_says_so(model, capsys):
    full = "the context of 600 tokens is full: /drop removes the oldest"
    for text, tokens, said in (("a", 4, ""), ("a" * 540, 100, full)):
        chat = model.chat()
        terminal._tell_a_full_context(chat, chat.ask(text, max_new_tokens=tokens))
        assert said in (err := capsys.readouterr().err)
        assert bool(err) == bool(said)


# --- interrupts ---------------------------------------------------------------------------------------------------
def test_an_interrupt_ends_an_answer_and_keeps_it(model, capsys, monkeypatch):
    whole = model.chat().ask("abc", **SETTINGS).text
    step, steps = Stream.__next__, itertools.count()

    def interrupted_after_three(stream):
        if next(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(stream)

    conversation = model.chat()
    with monkeypatch.context() as patch, interruptions() as interrupted:
        patch.setattr(Stream, "__next__", interrupted_after_three)
        print_answer(conversation, "abc", interrupted, **SETTINGS)
    assert capsys.readouterr().out == whole[:3] + "\n"
    assert conversation.messages[-1] == {"role": "assistant", "content": whole[:3]}
    # The cache of the conversation is whole: all of it is found again, but the letter that was not fed.
    assert conversation.ask("b", **SETTINGS).cached_tokens == len("<user>abc.<assistant>") + 2


def test_a_second_interrupt_is_one_as_always():
    before = signal.getsignal(signal.SIGINT)
    with interruptions() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert interrupted.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize(("flags", "ending"), [((), "Ctrl-D"), (("--untrusted",), "Ctrl-D"), ((), "Ctrl-C")])
def test_at_a_terminal(talking, model, tmp_path, flags, ending):
    conversation = model.chat()
    first, second = (conversation.ask(text, **SETTINGS).text for text in ("abc", "de"))
    typed = Terminal("chat", talking, "--threads", 1, *FLAGS, *flags)
    typed.until("/help lists the commands, Ctrl-C stops an answer, /exit or Ctrl-D ends.\n> ")
    for line, shown in (("abc", first), ("what?", "no token covers"), ("de", second)):  # an error is told, and no end
        typed.type(line + "\n")
        assert shown in typed.until("\n> ")
    typed.press()
    typed.until("Ctrl-C once more ends, and the conversation is lost: /save FILE keeps it.")
    typed.until("> ")
    if ending == "Ctrl-D":
        typed.type("\x04")
    else:
        typed.type(f"/save {tmp_path / 'talk.json'}\n")
        typed.until("4 messages\n> ")
        typed.press()  # the typed line was an answer to the first
        typed.until("Ctrl-C once more ends")
        typed.until("> ")
        typed.press()
    assert typed.end() == 0
    assert (tmp_path / "talk.json").exists() == (ending == "Ctrl-C")

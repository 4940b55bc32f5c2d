from __future__ import annotations

from typing import Any

import pytest

from pastkey.errors import InputError, MissingFileError, TemplateWarning
from pastkey.runtime import Chat, LanguageModel
from pastkey.runtime.sandbox.model import SandboxedModel

from .conftest import told

pytest.importorskip("jinja2")


def both(mine: SandboxedModel, theirs: LanguageModel, **given: Any) -> tuple[Chat, Chat]:
    return mine.chat(**given), theirs.chat(**given)


def test_a_conversation(untrusted, trusted, tmp_path):
    mine, theirs = both(untrusted, trusted, system="be kind")
    for question in ("hello", "and you"):
        answers = [chat.ask(question, max_new_tokens=6) for chat in (mine, theirs)]
        assert told(answers[0]) == told(answers[1])
    assert mine.messages == theirs.messages
    streamed = [[chunk.text for chunk in chat.stream("more", max_new_tokens=4)] for chat in (mine, theirs)]
    assert streamed[0] == streamed[1]
    mine.save(tmp_path / "talk.json")  # by this process
    mine.reset()
    mine.load(tmp_path / "talk.json")
    assert mine.messages == theirs.messages
    mine.undo()
    theirs.undo()
    mine.set_system("else")
    theirs.set_system("else")
    assert mine.messages == theirs.messages
    assert told(mine.ask("x", max_new_tokens=3)) == told(theirs.ask("x", max_new_tokens=3))


def test_an_answer_goes_on(untrusted, trusted):
    answers = []
    for chat in both(untrusted, trusted):
        chat.messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "abc"}]
        answers.append(told(chat.ask(max_new_tokens=4)))
    assert answers[0] == answers[1]


def test_a_template_of_ones_own_and_its_variables(untrusted, trusted, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}{{ 'tools' if tools }}")
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    mine, theirs = both(untrusted, trusted, template=file, mood="sad", tools=[tool])
    assert told(mine.ask("hello", max_new_tokens=4)) == told(theirs.ask("hello", max_new_tokens=4))
    with pytest.warns(TemplateWarning, match="does not read the variable 'colour'"):
        untrusted.chat(colour="red")
    with pytest.raises(InputError, match="the chat template does not take this conversation: <object"):
        untrusted.chat(template=file, mood=object()).ask("hello")
    with pytest.raises(MissingFileError, match="no such file"):
        untrusted.chat(template=tmp_path / "nowhere")
    file.write_text("{% if %}")
    with pytest.raises(InputError, match="the chat template is not valid Jinja"):
        untrusted.chat(template=file)
    file.write_text("{{ '\\ud800' }}{{ messages[0].content }}")
    with pytest.raises(InputError, match=r"half of a surrogate pair|not valid UTF-8"):
        untrusted.chat(template=file).ask("hello")
    assert untrusted.generate("a", max_new_tokens=1).new_tokens == 1


def test_contents_as_ordinary_characters(untrusted, trusted):
    mine, theirs = both(untrusted, trusted, special_tokens_as_text=True)
    assert told(mine.ask("a<b>c", max_new_tokens=4)) == told(theirs.ask("a<b>c", max_new_tokens=4))

"""The assistant's turns are found by the template's mark, or by rendering up to them; else the template is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from pastkey.errors import InputError
from pastkey.train.data.chat import conversation_parts
from pastkey.train.data.documents import Conversation

from .helpers import CHATML, MARKED, chat, chat_tokenizer

TALK = Conversation(chat("hi", "hello", "bye", "bye")["messages"])


@pytest.mark.parametrize(("template", "behind"), [(CHATML, "\n"), (MARKED, "")])
def test_the_turns_of_the_assistant_are_trained(template, behind):
    parts = conversation_parts(TALK, chat_tokenizer(template))
    assert [text for text, trained in parts if trained] == [f"hello<|im_end|>{behind}", f"bye<|im_end|>{behind}"]
    other = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert parts[0] == (other, False)
    assert "".join(text for text, _ in parts).count("<|im_start|>") == 4


def test_a_template_reads_the_special_tokens_and_tools():
    template = "{{ bos_token }}{{ tools | length if tools else 0 }}" + CHATML
    tokenizer = replace(chat_tokenizer(template), special_tokens={"bos_token": "<s>"})
    talk = replace(TALK, tools=[{"type": "function"}])
    assert conversation_parts(talk, tokenizer)[0][0].startswith("<s>1<|im_start|>user")


def test_a_conversation_without_an_assistant_has_no_trained_part():
    parts = conversation_parts(Conversation(chat("hi")["messages"]), chat_tokenizer())
    assert parts == [("<|im_start|>user\nhi<|im_end|>\n", False)]


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_it_marks_them():
    # as templates do that leave the reasoning of earlier turns out
    last = "{% if loop.last %}<think></think>{% endif %}"
    with pytest.raises(InputError, match="does not write message 2 as a continuation of those before it"):
        conversation_parts(TALK, chat_tokenizer(CHATML.replace("{{ '<|im_start|>'", last + "{{ '<|im_start|>'")))
    marked = chat_tokenizer(MARKED.replace("{{ '<|im_start|>'", last + "{{ '<|im_start|>'", 1))
    assert [trained for _, trained in conversation_parts(TALK, marked)] == [False, True, False, True, False]
    assert conversation_parts(TALK, chat_tokenizer("")) == [("", False)]


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "messages need a tokenizer with a chat template"),
        ("{% if %}", "the chat template does not take this conversation"),
        ("{{ raise_exception('roles must alternate') }}", "does not take this conversation: roles must alternate"),
    ],
)
def test_a_template_that_cannot_render_is_refused(template, sentence):
    with pytest.raises(InputError, match=sentence):
        conversation_parts(TALK, chat_tokenizer(template))

"""Chat templates, rendered as transformers renders them: where they are found, their variables, and their bounds."""

from __future__ import annotations

import dataclasses
import datetime
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pastkey.contract import names
from pastkey.contract.bundle import Bundle
from pastkey.errors import InputError, MissingExtraError, MissingFileError
from pastkey.files.durable import write_json
from pastkey.files.folder import file_record
from pastkey.runtime.text.chat_template import ChatTemplate, read_template
from pastkey.runtime.text.environment import MAX_OUTPUT

jinja2 = pytest.importorskip("jinja2")

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

# Written in the styles that models come with.
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "instructions": """\
{% if messages[0].role == 'system' %}
  {% set told, rest = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n', messages[1:] %}
{% else %}
  {% set told, rest = '', messages %}
{% endif %}
{% for message in rest %}
  {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('roles must take turns: user, assistant, user, ...') }}
  {% endif %}
  {% if message.role == 'user' %}
{{ bos_token ~ '[INST] ' ~ (told if loop.first else '') ~ message.content.strip() ~ ' [/INST]' }}
  {%- else %}
{{ ' ' ~ message.content | trim ~ ' ' ~ eos_token }}
  {%- endif %}
{% endfor %}
""",
    "tools": """\
{%- set state = namespace(seen=0) -%}
{{- bos_token }}{% if tools is not none and tools %}tools: {{ tools | tojson }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if state.seen >= 4 %}{% break %}{% endif %}
    {%- set state.seen = state.seen + 1 %}
{{ message | tojson(indent=2) }}{{ message.content | tojson }}{{ message.content | upper | replace('A', '4') }}
{%- endfor %}
{{ documents is none }}{{ sep_token is defined }}{{ unk_token }}{{ nothing }}
{% macro turn(name) %}<{{ name }}>{% endmacro %}
{% generation %}{% set state.seen = 9 %}{{ turn('assistant') }}{% endgeneration %}{{ state.seen }}
""",
    # In the manner of models that call tools: Hermes and Qwen, and of those that think first.
    "hermes": """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + (message.content or '').split('</think>')[-1].lstrip('\\n') }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- elif message.role == 'user' or not tools %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' ~ ('<think>\\n\\n</think>\\n' if thinking is false) }}
{%- endif %}
""",
}


MESSAGES = [{"role": "user", "content": "a"}]


def test_a_template_knows_the_variables_that_it_reads():
    template = ChatTemplate("{% if thinking %}{{ bos_token }}{% endif %}{% set x = 1 %}{{ x }}{{ messages }}")
    assert template.variables == {"thinking", "bos_token", "messages"}


PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "image"}]


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        ("{{ messages }}", [], "the last message has no text to continue"),
        ("{{ messages }}", [{"role": "assistant", "content": None}], "the last message has no text to continue"),
        ("{{ messages }}", [{"role": "assistant", "content": []}], "the last message has no text to continue"),
        ("{{ messages[-1].content[:3] }}", [{"content": "long"}], "does not write the last message unchanged"),
    ],
)
def test_a_message_that_cannot_be_continued_is_told(template, messages, words):
    with pytest.raises(InputError, match=words):
        ChatTemplate(template).render(messages, continue_final_message=True)


RENDERED: list[tuple[str, Any, dict[str, Any], str]] = [
    (
        TEMPLATES["chatml"],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi "}],
        {},
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        "{% for p in messages[-1].content %}{{ p.text }}{% endfor %}<end>",
        [{"role": "assistant", "content": PARTS}],
        {"continue_final_message": True},
        "ab",
    ),
    ("{{ strftime_now('%Y') }}", MESSAGES, {}, str(datetime.datetime.now().year)),
    ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}", MESSAGES, {}, "13"),
    ("{% generation %}{{ 1 }}{% endgeneration %}", MESSAGES, {}, "1"),
    ("  {% if true %}\na{% endif %}", MESSAGES, {}, "a"),
    ("{{ '<é>' | tojson }}{{ [1] | tojson(indent=1) }}", MESSAGES, {}, '"<é>"[\n 1\n]'),
]


@pytest.mark.parametrize(("template", "messages", "options", "expected"), RENDERED)
def test_a_rendering_word_for_word(template, messages, options, expected):
    """Without transformers, so that it is seen wherever the tests run."""
    assert ChatTemplate(template).render(messages, **options) == expected


def test_a_template_sees_plain_values_only():
    class Text(str):
        def secret(self) -> str:
            return "secret"

    message: dict[str, Any] = {"role": "user", "content": Text("a"), "n": np.int64(3), "t": (1, 2.5, None, True)}
    assert ChatTemplate("{{ messages[0].content.secret is defined }}").render([message]) == "False"
    assert ChatTemplate("{{ messages[0] | tojson }}").render([message]) == (
        '{"role": "user", "content": "a", "n": 3, "t": [1, 2.5, null, true]}'
    )
    with pytest.raises(InputError, match="is a object; text, numbers, lists and dicts were expected"):
        ChatTemplate("a").render([{"role": "user", "content": object()}])


# --- what is refused ----------------------------------------------------------------------------------------------
TOO_MUCH = "does not accept this conversation"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (TEMPLATES["instructions"], f"{TOO_MUCH}: roles must take turns: user, assistant"),
        ("{{ messages[0].content.nothing.more }}", f"{TOO_MUCH}: .* has no attribute"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", f"{TOO_MUCH}: .*recursion"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", TOO_MUCH),
        ("{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}", TOO_MUCH),
        ("{% include 'other' %}", TOO_MUCH),
        ("{{ messages[0].update(role='system') }}", TOO_MUCH),
        ("{{ range(99999999) }}", TOO_MUCH),
        ("a\n{% endfor %}", r"is not valid Jinja: .*endfor.* \(line 2\)"),
        ("{{ messages | nothing }}", "is not valid Jinja: No filter named 'nothing'"),
        ("a" * 200_001, "cannot be compiled: it has 200,001 characters; at most 200,000 are allowed"),
    ],
)
def test_a_template_that_fails_is_told_in_a_sentence(template, words):
    with pytest.raises(InputError, match=f"the chat template {words}"):
        ChatTemplate(template, TOKENS).render([{"role": "assistant", "content": "a"}])


def test_constants_are_not_computed_where_a_template_is_compiled(monkeypatch):
    def computed(*_: int) -> int:
        raise AssertionError("it was computed")

    for operator in ("**", "*"):
        monkeypatch.setitem(jinja2.nodes._binop_to_func, operator, computed)
    ChatTemplate("{{ 7 ** (10 ** 8) }}{{ 'x' * 10 ** 9 }}")


def test_a_long_rendering_is_refused():
    template = ChatTemplate("{% for part in parts %}{{ part }}{% endfor %}")
    assert len(template.render([], parts=["a" * (MAX_OUTPUT // 4)] * 4)) == MAX_OUTPUT
    for parts in (["a" * (MAX_OUTPUT + 1)], ["a" * (MAX_OUTPUT // 4)] * 5):
        with pytest.raises(InputError, match=f"{TOO_MUCH}: it writes more than 4,000,000 charact"):
            template.render([], parts=parts)


# --- from a bundle ------------------------------------------------------------------------------------------------
@pytest.fixture
def bundle_with(tmp_path, speaking_bundle):
    """A bundle with these two files, both listed unless `listed` says which."""

    def make(config: Any, file: str | None = None, listed: Sequence[str] | None = None) -> Bundle:
        if config is not None:
            write_json(tmp_path / names.TOKENIZER_CONFIG, config)
        if file is not None:
            (tmp_path / names.CHAT_TEMPLATE).write_text(file, encoding="utf-8")
        there = [path.name for path in tmp_path.iterdir()] if listed is None else listed
        records = {name: file_record(tmp_path / name) for name in there}
        return Bundle(tmp_path, dataclasses.replace(speaking_bundle.manifest, files=records))

    return make


BOTH = {"chat_template": "{{ bos_token }}a", "bos_token": "<s>"}, "{{ bos_token }}b"


@pytest.mark.parametrize(
    ("config", "file", "listed", "expected"),
    [
        (BOTH[0], None, None, "<s>a"),
        (
            {"chat_template": "{{ eos_token }}a", "eos_token": {"content": "</s>"}, "bos_token": None},
            None,
            None,
            "</s>a",
        ),
        ({"chat_template": "{{ add_bos_token }}a", "add_bos_token": True}, None, None, "a"),
        ({"chat_template": [{"name": "x", "template": "b"}, {"name": "default", "template": "a"}]}, None, None, "a"),
        ({"chat_template": {"x": "b", "default": "a"}}, None, None, "a"),
        ({"chat_template": "b", "bos_token": "<s>"}, "{{ bos_token }}é", None, "<s>é"),
        (None, "a", None, "a"),
        (*BOTH, [names.TOKENIZER_CONFIG], "<s>a"),  # a file that the manifest does not list is not read
        (*BOTH, [names.CHAT_TEMPLATE], "b"),
    ],
)
def test_where_a_template_is_found(config, file, listed, expected, bundle_with):
    assert ChatTemplate.from_bundle(bundle_with(config, file, listed)).render(MESSAGES) == expected


def test_another_template_is_taken_with_the_bundles_special_tokens(bundle_with, tmp_path):
    bundle = bundle_with({"chat_template": "a", "bos_token": "<s>"}, "b")
    other = tmp_path / "other.jinja"
    other.write_text("{{ bos_token }}é", encoding="utf-8")
    assert ChatTemplate.from_bundle(bundle, read_template(other)).render([]) == "<s>é"
    assert read_template(str(other)) == read_template(other)
    other.write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"other\.jinja is not UTF-8 text"):
        read_template(other)
    with pytest.raises(MissingFileError, match=r"no such file: .*none\.jinja"):
        read_template(tmp_path / "none.jinja")


NONE = r"has no chat template .* --template FILE"
NAMED = {"chat_template": [{"name": "tool_use", "template": "a"}, {"name": "rag", "template": "b"}]}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, NONE),
        ({}, NONE),
        ({"chat_template": None}, NONE),
        ({"chat_template": []}, NONE),
        ({"chat_template": 3}, NONE),
        (NAMED, r"named tool_use, rag, and none named default.* --template FILE"),
    ],
)
def test_a_bundle_without_template_says_what_to_do(config, words, bundle_with):
    with pytest.raises(InputError, match=words):
        ChatTemplate.from_bundle(bundle_with(config))
    with pytest.raises(InputError, match=NONE):
        ChatTemplate.from_bundle(bundle_with(*BOTH, listed=[]))


def test_without_jinja2_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"'jinja2' is not installed.*pip install '\.\[chat\]'"):
        ChatTemplate("a")

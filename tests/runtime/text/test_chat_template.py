"""Chat templates, rendered as transformers renders them."""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from pastkey import names
from pastkey.bundle import Bundle
from pastkey.errors import InputError, MissingExtraError, MissingFileError
from pastkey.folder import file_record
from pastkey.runtime.text.chat_template import ChatTemplate

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
    "dated": "{{ strftime_now('%Y') }} {%- for m in messages|reverse %} {{ m.content[:3] }} {%- endfor -%} {# end #}",
}


@pytest.fixture(scope="module")
def reference() -> Any:
    """A tokenizer of transformers, whose apply_chat_template takes a template."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **TOKENS)


def conversation(system: str | None, texts: list[str]) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, *({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts))]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_rendering_is_that_of_transformers(reference: Any, name: str) -> None:
    template = ChatTemplate(TEMPLATES[name], TOKENS)

    @given(st.none() | st.text(), st.lists(st.text() | st.sampled_from(["<b>&'\"", " a\n", "é\t日"]), min_size=1))
    def check(system: str | None, texts: list[str]) -> None:
        messages = conversation(system, texts)
        expected = reference.apply_chat_template(
            messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
        )
        assert template.render(messages) == expected

    check()


def test_a_rendering_word_for_word() -> None:
    """The same without transformers, so that it is seen wherever the tests run."""
    messages = conversation("Be brief.", ["Hi ", "Hello.", "Bye"])
    assert ChatTemplate(TEMPLATES["chatml"]).render(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ChatTemplate(TEMPLATES["instructions"], TOKENS).render(messages) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. </s><s>[INST] Bye [/INST]"
    )
    assert '"<b>é"' in ChatTemplate(TEMPLATES["tools"]).render(conversation(None, ["<b>é"]))
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(messages) == str(datetime.datetime.now().year)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (TEMPLATES["instructions"], "does not take this conversation: roles must take turns: user, assistant"),
        ("{{ messages[0].content.nothing.more }}", "does not take this conversation: .* has no attribute"),
        ("{{ 1 / 0 }}", "does not take this conversation: division by zero"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "does not take this conversation: .*recursion"),
        ("{{ messages.append(1) }}", "does not take this conversation: .*not callable|unsafe"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "does not take this conversation"),
        ("{% if %}", r"is not valid Jinja: .*\(line 1\)"),
        ("a\n{% endfor %}", r"is not valid Jinja: .*endfor.* \(line 2\)"),
        ("{{ messages | nothing }}", "is not valid Jinja: No filter named 'nothing'"),
    ],
)
def test_a_template_that_fails_is_told_in_a_sentence(template: str, words: str) -> None:
    with pytest.raises(InputError, match=f"the chat template {words}"):
        ChatTemplate(template, TOKENS).render([{"role": "assistant", "content": "a"}])


# --- from a bundle ------------------------------------------------------------------------------------------------
@pytest.fixture
def bundle_with(tmp_path: Path, speaking_bundle: Bundle) -> Callable[..., Bundle]:
    """A bundle with these two files, both listed unless `listed` says which."""

    def make(config: dict[str, Any] | None, file: str | None = None, listed: Sequence[str] | None = None) -> Bundle:
        files = []
        if config is not None:
            (tmp_path / names.TOKENIZER_CONFIG).write_text(json.dumps(config))
            files.append(names.TOKENIZER_CONFIG)
        if file is not None:
            (tmp_path / names.CHAT_TEMPLATE).write_text(file, encoding="utf-8")
            files.append(names.CHAT_TEMPLATE)
        records = {name: file_record(tmp_path / name) for name in (files if listed is None else listed)}
        return Bundle(tmp_path, dataclasses.replace(speaking_bundle.manifest, files=records))

    return make


@pytest.mark.parametrize(
    ("config", "file", "expected"),
    [
        ({"chat_template": "{{ bos_token }}a", "bos_token": "<s>"}, None, "<s>a"),
        ({"chat_template": "{{ eos_token }}a", "eos_token": {"content": "</s>"}, "bos_token": None}, None, "</s>a"),
        ({"chat_template": "{{ add_bos_token }}a", "add_bos_token": True}, None, "a"),
        ({"chat_template": [{"name": "x", "template": "b"}, {"name": "default", "template": "a"}]}, None, "a"),
        ({"chat_template": {"x": "b", "default": "a"}}, None, "a"),
        ({"chat_template": "b", "bos_token": "<s>"}, "{{ bos_token }}é", "<s>é"),
        (None, "a", "a"),
    ],
    ids=["string", "object", "no_token", "named", "mapped", "file_first", "file_alone"],
)
def test_where_a_template_is_found(
    config: dict[str, Any] | None, file: str | None, expected: str, bundle_with: Callable[..., Bundle]
) -> None:
    template = ChatTemplate.from_bundle(bundle_with(config, file))
    assert template.render([{"role": "user", "content": "x"}]) == expected


def test_a_file_that_the_manifest_does_not_list_is_not_read(bundle_with: Callable[..., Bundle]) -> None:
    config = {"chat_template": "{{ bos_token }}a", "bos_token": "<s>"}
    template = ChatTemplate.from_bundle(bundle_with(config, "added", listed=[names.TOKENIZER_CONFIG]))
    assert template.render([]) == "<s>a"
    template = ChatTemplate.from_bundle(bundle_with(config, "{{ bos_token }}b", listed=[names.CHAT_TEMPLATE]))
    assert template.render([]) == "b"
    with pytest.raises(InputError, match=r"has no chat template .* --template FILE"):
        ChatTemplate.from_bundle(bundle_with(config, "added", listed=[]))


def test_another_template_is_taken_with_the_bundles_special_tokens(
    bundle_with: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = bundle_with({"chat_template": "a", "bos_token": "<s>"}, "b")
    other = tmp_path / "other.jinja"
    other.write_text("{{ bos_token }}é", encoding="utf-8")
    assert ChatTemplate.from_bundle(bundle, other).render([]) == "<s>é"
    assert ChatTemplate.from_bundle(bundle, str(other)).render([]) == "<s>é"
    other.write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"other\.jinja is not UTF-8 text"):
        ChatTemplate.from_bundle(bundle, other)
    with pytest.raises(MissingFileError, match=r"no such file: .*none\.jinja"):
        ChatTemplate.from_bundle(bundle, tmp_path / "none.jinja")
    with pytest.raises(InputError, match="template is 3; the path of a chat template was expected"):
        ChatTemplate.from_bundle(bundle, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [None, {}, {"chat_template": None}, {"chat_template": []}, {"chat_template": 3}])
def test_a_bundle_without_template_points_to_run(
    config: dict[str, Any] | None, bundle_with: Callable[..., Bundle], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"has no chat template .* pastkey run {tmp_path} --prompt TEXT"):
        ChatTemplate.from_bundle(bundle_with(config))


def test_named_templates_without_a_default_are_listed(bundle_with: Callable[..., Bundle]) -> None:
    named = {"chat_template": [{"name": "tool_use", "template": "a"}, {"name": "rag", "template": "b"}]}
    with pytest.raises(InputError, match=r"named tool_use, rag, and none named default.* --template FILE"):
        ChatTemplate.from_bundle(bundle_with(named))


def test_without_jinja2_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"'jinja2' is not installed.*pip install jinja2  and"):
        ChatTemplate("a")

"""What a template may use, what it may not reach, and the bounds of its source and its output."""

from __future__ import annotations

from typing import Any

import pytest

from pastkey.errors import InputError
from pastkey.runtime.text.chat_template import ChatTemplate
from pastkey.runtime.text.environment import MAX_OUTPUT

pytest.importorskip("jinja2")

MESSAGES = [{"role": "user", "content": "a"}]


def test_a_long_template_is_refused_before_it_is_compiled():
    with pytest.raises(InputError, match="cannot be compiled: it has 200,001 characters, and 200,000 are the most"):
        ChatTemplate("a" * 200_001)


def test_constants_are_not_computed_where_a_template_is_compiled():
    ChatTemplate("{{ 7 ** (10 ** 8) }}")


def test_a_long_rendering_is_refused():
    template = ChatTemplate("{% for part in parts %}{{ part }}{% endfor %}")
    assert len(template.render([], parts=["a" * (MAX_OUTPUT // 4)] * 4)) == MAX_OUTPUT
    for parts in (["a" * (MAX_OUTPUT + 1)], ["a" * (MAX_OUTPUT // 4)] * 5):
        with pytest.raises(InputError, match="does not take this conversation: it writes more than 4,000,000 charact"):
            template.render([], parts=parts)


@pytest.mark.parametrize(
    "template",
    [
        "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
        "{% include 'other' %}",
        "{{ messages[0].update(role='system') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ range(99999999) }}",
    ],
)
def test_what_a_template_may_not_do_is_told(template):
    with pytest.raises(InputError, match="the chat template does not take this conversation: "):
        ChatTemplate(template).render(MESSAGES)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "13"),
        ("{% generation %}{{ 1 }}{% endgeneration %}", "1"),
        ("  {% if true %}\na{% endif %}", "a"),
        ("{{ '<é>' | tojson }}{{ [1] | tojson(indent=1) }}", '"<é>"[\n 1\n]'),
    ],
)
def test_what_templates_use_beyond_plain_jinja(expression, expected):
    assert ChatTemplate(expression).render(MESSAGES) == expected


def test_a_template_sees_plain_values_only():
    class Text(str):
        def secret(self) -> str:
            return "secret"

    numpy = pytest.importorskip("numpy")
    message = {"role": "user", "content": Text("a"), "n": numpy.int64(3), "t": (1, 2.5, None, True)}
    assert ChatTemplate("{{ messages[0].content.secret is defined }}").render([message]) == "False"
    assert ChatTemplate("{{ messages[0] | tojson }}").render([message]) == (
        '{"role": "user", "content": "a", "n": 3, "t": [1, 2.5, null, true]}'
    )
    odd: Any = {"role": "user", "content": object()}
    with pytest.raises(InputError, match="is a object; text, numbers, lists and dicts were expected"):
        ChatTemplate("a").render([odd])

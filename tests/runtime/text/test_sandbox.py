"""A template that asks for more time or memory than it may have is an error in a sentence, and soon."""

from __future__ import annotations

import time
from typing import Any

import pytest

from pastkey.errors import InputError
from pastkey.runtime.text import sandbox
from pastkey.runtime.text.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "a"}]
BIG = "('a' * 1000000)"


def doubling(what: str) -> str:
    """Sixty times what `ns.v` was, twice."""
    return f"{{% set ns = namespace(v='ab') %}}{{% for i in range(60) %}}{{% set ns.v = {what} %}}{{% endfor %}}"


HOSTILE = {
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "a recursive loop": "{% for x in range(100000) recursive %}{{ loop(range(100000)) }}{% endfor %}",
    "a loop over a generator": "{% for i in range(99999) %}"
    "{% for j in range(99999)|map('string') %}{% endfor %}{% endfor %}",
    "macros": "{% macro a(n) %}{% if n %}{{ a(n-1) }}{{ a(n-1) }}{% endif %}{% endmacro %}{{ a(60) }}",
    "a repeated text": "{{ 'a' * 10**9 }}",
    "text repeated from the left": "{{ 10**9 * 'a' }}",
    "text doubled by ~": doubling("ns.v ~ ns.v"),
    "text doubled by +": doubling("ns.v + ns.v"),
    "text doubled by a format": doubling("'%s%s' % (ns.v, ns.v)"),
    "text doubled by join": doubling("[ns.v, ns.v]|join"),
    "text doubled by replace": doubling("ns.v|replace('a', ns.v)"),
    "nested lists": doubling("[ns.v, ns.v]") + "{{ ns.v }}",
    "nested tuples": doubling("(ns.v, ns.v)") + "{{ ns.v == 1 }}",
    "nested dicts": doubling("{'a': ns.v, 'b': ns.v}") + "{{ ns.v | tojson }}",
    "nested namespaces": doubling("namespace(a=ns.v, b=ns.v)") + "{{ ns.v }}",
    "nested arguments": "{% set ns = namespace(v=1) %}{% macro f() %}{% set ns.v = varargs %}{% endmacro %}"
    "{% for i in range(60) %}{{ f(ns.v, ns.v) }}{% endfor %}{{ ns.v }}",
    "numbers": "{% set ns = namespace(v=3) %}{% for i in range(99) %}{% set ns.v = ns.v * ns.v %}{% endfor %}",
    "a power": "{{ 10**(10**10) }}",
    "a number rounded": "{{ (10**300)|round(-10**7) }}",
    "a repeated list": "{{ [1] * 10**9 }}",
    "a list printed": f"{{{{ [{BIG}] * 90000 }}}}",
    "a list as JSON": f"{{{{ ([{BIG}] * 90000)|tojson }}}}",
    "a list as text": f"{{{{ ([{BIG}] * 90000)|upper }}}}",
    "a list raised": f"{{{{ raise_exception([{BIG}] * 90000) }}}}",
    "JSON of an indent": "{{ messages | tojson(indent=10**9) }}",
    "a width": "{{ '%1000000000d' % 1 }}",
    "a width given": "{{ '%*d' % (10**9, 1) }}",
    "a width in braces": "{{ '{:1000000000}'.format(1) }}",
    "a width in braces given": "{{ '{:{}}'.format(1, '1000000000') }}",
    "many fields": f"{{{{ ('{{0}}' * 90000).format({BIG}) }}}}",
    "centred": "{{ 'a'.center(10**9) }}",
    "centred by the filter": "{{ 'a' | center(10**9) }}",
    "indented": "{{ ('\n' * 1000000) | indent(100000) }}",
    "expanded": "{{ ('\t' * 1000000).expandtabs(100000) }}",
    "bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "joined by a method": f"{{{{ {BIG}.join(range(99999)|map('string')) }}}}",
    "replaced by a method": f"{{{{ {BIG}.replace('a', {BIG}) }}}}",
    "translated": "{{ 'a'.translate({97: 'b' * 1000000}) }}",
    "a sum of lists": "{{ ([['a']] * 1000)|sum(start=[]) }}",
    "tags stripped": "{{ ('<' * 1000000)|striptags }}",
    "the time": "{{ strftime_now('%c' * 100000) }}",
    "much output": "{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}",
    "much text of its own": "{% macro m() %}{% for i in range(99999) %}"
    + "a" * 10000
    + "{% endfor %}{% endmacro %}{{ m() }}",
    "many texts kept": "{% set ns = namespace(v=[]) %}"
    f"{{% for i in range(999) %}}{{% set ns.v = ns.v + [{BIG} ~ i] %}}"
    "{% endfor %}",
    "comparisons": f"{{% for i in range(99999) %}}{{% if {BIG} == {BIG} %}}{{% endif %}}{{% endfor %}}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_asks_for_too_much_is_told(name: str) -> None:
    template = ChatTemplate(HOSTILE[name])
    started = time.thread_time()
    with pytest.raises(InputError, match=r"the chat template spends more than it may, .* take another one with --temp"):
        template.render(MESSAGES)
    assert time.thread_time() - started < 2 * sandbox.MAX_SECONDS


def test_constants_that_are_computed_when_it_is_compiled_are_bounded_too() -> None:
    with pytest.raises(InputError, match=r"the chat template (cannot be compiled: a width|spends more than it may)"):
        ChatTemplate("{{ 'a' | center(999999999) }}").render(MESSAGES)


def test_a_long_template_is_refused_before_it_is_compiled() -> None:
    with pytest.raises(InputError, match="cannot be compiled: it has 200,001 characters, and 200,000 are the most"):
        ChatTemplate("a" * 200_001)


@pytest.mark.parametrize(
    "template",
    [
        "{% set ns = namespace(unsafe_callable=true) %}{{ ns() }}",
        "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
        "{{ lipsum(n=1000000) }}",
        "{% include 'other' %}",
    ],
)
def test_what_else_fails_is_told_as_the_templates_own_words(template: str) -> None:
    with pytest.raises(InputError, match="the chat template does not take this conversation: "):
        ChatTemplate(template).render(MESSAGES)


def test_the_clock_ends_a_template_whose_steps_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.05)
    with pytest.raises(InputError, match=r"spends more than it may, more than 0\.05 seconds"):
        ChatTemplate("{% for i in range(99999) %}{% for j in range(9) %}{{ 1 }}{% endfor %}{% endfor %}").render([])


def test_each_rendering_has_a_budget_of_its_own() -> None:
    template = ChatTemplate("{% for i in range(90000) %}{% endfor %}ok")
    assert {template.render(MESSAGES) for _ in range(30)} == {"ok"}


def test_a_conversation_of_a_thousand_messages_has_room() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% set rest = messages[loop.index:] %}{{ m.content | trim }}{% endfor %}"
    )
    text = "word " * 200
    assert len(template.render([{"role": "user", "content": text}] * 1000)) == 1000 * 999


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("{{ 'a' ~ 1 ~ none }}", "a1None"),
        ("{{ [1, 'a', {'b': (2,)}] }}", "[1, 'a', {'b': (2,)}]"),
        ("{% for a, b in {'x': 1}.items() %}{{ loop.length }}{{ loop.last }}{{ a }}{{ b }}{% endfor %}", "1Truex1"),
        ("{% for x in [3, 1]|sort if x > 1 %}{{ x }}{% else %}none{% endfor %}", "3"),
        ("{{ messages[-1:][0].role }}{{ 'abc'[::-1] }}", "usercba"),
        ("{{ 2 * 3 - 1 }}{{ 7 % 4 }}{{ 'ab' * 2 }}{{ 2 ** 3 }}{{ '%s-%03d' % ('a', 7) }}", "53abab8a-007"),
        ("{{ '-'.join(['a', 'b']) }}{{ ['a', 1]|join(', ') }}", "a-ba, 1"),
        ("{{ [{'n': 1}, {'n': 2}]|join('+', attribute='n') }}", "1+2"),
        ("{{ 'a-b'.replace('-', '+') }}{{ 'a-b'|replace('-', '') }}{{ '{}{x}'.format(1, x=2) }}", "a+bab12"),
        ("{{ 'a\nb'|indent(2) }}{{ 'a'.ljust(3) }}|{{ nothing }}{{ true }}{{ 1.5 }}", "a\n  ba  |True1.5"),
        ("{% macro m(a, b='x') %}{{ a }}{{ b }}{{ varargs }}{% endmacro %}{{ m(1, 2, 3) }}", "12(3,)"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x|upper }}{% call m() %}{% endcall %}", None),
        ("{% macro m() %}<{{ caller() }}>{% endmacro %}{% call m() %}b{% endcall %}", "<b>"),
        ("{% for x in [1, [2]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}", "12"),
        ("{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|list }}", "['a']"),
        ("{{ dict(a=1) | items | list }}{{ namespace(a=1).a }}{{ range(3)|list }}", "[('a', 1)]1[0, 1, 2]"),
    ],
)  # fmt: skip
def test_what_is_charged_means_what_it_meant(expression: str, expected: str | None) -> None:
    if expected is None:
        with pytest.raises(InputError, match="'m' is undefined"):
            ChatTemplate(expression).render(MESSAGES)
    else:
        assert ChatTemplate(expression).render(MESSAGES) == expected


def test_a_template_sees_plain_values_only() -> None:
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

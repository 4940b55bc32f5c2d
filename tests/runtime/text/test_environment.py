"""What a template may use, what it may not reach, and the bounds of its source and its output."""

from __future__ import annotations

import tracemalloc
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


def test_a_long_rendering_is_refused():
    template = ChatTemplate("{% for part in parts %}{{ part }}{% endfor %}")
    assert len(template.render([], parts=["a" * (MAX_OUTPUT // 4)] * 4)) == MAX_OUTPUT
    for parts in (["a" * (MAX_OUTPUT + 1)], ["a" * (MAX_OUTPUT // 4)] * 5):
        with pytest.raises(InputError, match="does not take this conversation: it writes more than 4,000,000 charact"):
            template.render([], parts=parts)


@pytest.mark.parametrize(
    "template",
    [
        "{% set ns = namespace(unsafe_callable=true) %}{{ ns() }}",
        "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
        "{% include 'other' %}",
        "{{ messages[0].update(role='system') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ range(99999999) }}",
        "{{ lipsum(n=10**6) }}",
    ],
)
def test_what_a_template_may_not_do_is_told(template):
    with pytest.raises(InputError, match="the chat template does not take this conversation: "):
        ChatTemplate(template).render(MESSAGES)


GROWN = "{% set ns = namespace(x=[1], y='a', n=3) %}{% for i in range(90) %}{% set ns.GROWTH %}{% endfor %}"
BIG = "('x' * 1000000)"


TOO_LARGE = [
    # operators
    "{{ 'x' * 10**9 }}", "{{ 10**9 * 'x' }}", "{{ [1] * 10**9 }}", "{{ 10**10**10 }}", "{{ ((10**60)**60)**60 }}",
    "{{ '%1000000000d' % 1 }}", "{{ '%*d' % (10**9, 1) }}", "{{ '%.1000000000f' % 1 }}",
    "{{ '%(a)1000000000d' % {'a': 1} }}", f"{{{{ {BIG} * 3 + {BIG} * 3 }}}}", f"{{{{ ({BIG} * 3) ~ ({BIG} * 3) }}}}",
    GROWN.replace("GROWTH", "n = ns.n * ns.n"), GROWN.replace("GROWTH", "x = ns.x + ns.x"),
    # one value many times in another
    GROWN.replace("GROWTH", "x = ns.x, ns.x") + "{{ ns.x ~ '' }}",
    GROWN.replace("GROWTH", "x = {'a': ns.x, 'b': ns.x}") + "{{ ns.x | tojson }}",
    "{% macro m() %}{% set ns.x = varargs %}{% endmacro %}" + GROWN.replace("GROWTH", "y = m(ns.x, ns.x)"),
    # methods
    "{{ 'x'.center(10**10) }}", "{{ 'x'.ljust(10**9) }}", "{{ 'x'.zfill(10**9) }}", "{{ '\t'.expandtabs(10**9) }}",
    "{{ ('x' | attr('center'))(10**9) }}", "{% set f = 'x'.center %}{{ f(10**9) }}",
    "{{ 'x'.encode().center(10**9) }}", "{{ '{:1000000000}'.format(1) }}", "{{ '{:{w}}'.format(1, w=10**9) }}",
    "{{ '{a:>9999999}'.format_map({'a': 1}) }}", f"{{{{ '{{0}}{{0}}{{0}}{{0}}{{0}}'.format({BIG}) }}}}",
    f"{{{{ {BIG}.replace('', {BIG}) }}}}", f"{{{{ {BIG}.join(['a'] * 100000) }}}}",
    f"{{{{ {BIG}.translate({{120: {BIG}}}) }}}}", "{{ (1).to_bytes(10**9, 'big') }}",
    # filters
    "{{ 'x' | center(10**9) }}", "{{ ('a\n' * 1000) | indent(1000000) }}", "{{ [1] | tojson(indent=10**9) }}",
    "{{ [[1]] | tojson(indent=100000) }}",
    f"{{{{ ([1] * 1000) | tojson(separators=({BIG}, ':')) }}}}", "{{ 1 | round(-10**9) }}",
    "{{ '%1000000000d' | format(1) }}", "{{ ['x'] | map('center', 10**9) | list }}",
    f"{{{{ (['a'] * 1000) | join({BIG}) }}}}", "{{ ([[1]] * 100000) | sum(start=[]) }}",
    f"{{{{ {BIG} | replace('x', {BIG}) }}}}", "{% filter center(10**9) %}a{% endfilter %}",
    # numbers of many digits, forms with many or hidden widths
    "{{ ('f' * 1000000) | int(0, 16) > 3 }}", "{{ 2**63 * 2**63 > 3 }}", "{{ ('%(a)9999d' * 20000) % {'a': 1} }}",
    "{{ ('{0:9999}' * 100000).format(1) }}", "{{ '{0:9000000}{'.format(1) }}",
    "{{ '%(a\nb)9000000d' % {'a\nb': 1} }}", "{{ '%9000000d'.encode() % 1 }}", "{{ '%*d' % (9000000, 1) }}",
    "{{ strftime_now('%9000000Y') }}",
]  # fmt: skip
TOO_LONG = [
    f"{{{{ {BIG}.join(range(100000)|map('string')) }}}}",
    f"{{% set y %}}{{% for i in range(1000) %}}{{{{ {BIG} }}}}{{% endfor %}}{{% endset %}}{{{{ y | length }}}}",
    "{% macro m() %}{% for i in range(1000) %}{{ 'x' * 100000 }}{% endfor %}{% endmacro %}{{ m() | length }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% set r = range(100000) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    f"{{% set a = {BIG} ~ 1 %}}{{% set b = {BIG} ~ 2 %}}{{% for i in range(100000) if a == b %}}{{% endfor %}}",
    f"{{% set a = {BIG} ~ 1 %}}{{% for i in range(100000) %}}{{% set b = a[1:] is lower %}}{{% endfor %}}",
    "{% for a in range(100000) recursive %}{% if loop.depth < 4 %}{{ loop(range(100000)) }}{% endif %}{% endfor %}",
]


@pytest.mark.parametrize(
    ("template", "words"),
    [(template, "it makes a value of more than 4,000,000 ch") for template in TOO_LARGE]
    + [(template, "it takes too many steps") for template in TOO_LONG],
)
def test_no_operation_takes_all_memory_or_holds_the_interpreter(template, words, monkeypatch):
    monkeypatch.setattr("pastkey.runtime.text.chat_template.MAX_WORK", 20_000_000)
    compiled = ChatTemplate(template)
    with pytest.raises(InputError, match=words):
        compiled.render(MESSAGES)


def test_long_contents_in_a_loop_are_rendered():
    template = "{% for m in messages %}{% set c = m.content %}{{ c.strip() if c.startswith('a') }}{% endfor %}"
    assert len(ChatTemplate(template).render([{"role": "user", "content": "a" * 1_900_000}] * 2)) == 3_800_000


def test_constants_are_not_folded_beyond_the_bound():
    """Jinja computes them when it compiles a template, and writes each into the Python that it makes of it."""
    tracemalloc.start()
    try:
        ChatTemplate("{{ 'x' | center(1000000) }}" * 200)
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "expression",
    [
        "{% for x in xs %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{{ loop.nextitem }}{% endfor %}",
        "{% for x in xs %}{{ loop.cycle('a', 'b') }}{{ loop.revindex0 }}{{ loop.changed(x // 2) }}{% endfor %}",
        "{% for x in xs if x != 2 %}{{ x }}{% else %}none{% endfor %}{% for x in [] %}{% else %}none{% endfor %}",
        "{% for k, v in {'a': xs, 'b': 1}.items() %}{{ k ~ v ~ '%' }}{% endfor %}{% for x in missing %}1{% endfor %}",
        "{% for x in [1, [2, 3]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
        "{% macro m(a) %}{{ a }}{{ varargs }}{{ caller() }}{% endmacro %}{% call m(1, 2) %}x{% endcall %}",
        "{% set a, b = 1, xs %}{{ a }}{{ (b, a) }}{{ {'a': a, 'b': [b, none]} | tojson }}{{ a in [b, a] }}",
        "{{ 2 ** 10 }}{{ 7 % 4 }}{{ 2.5 * 2 }}{{ 'a' * 3 }}{{ [1] + xs }}{{ '%s-%05.1f' % ('a', 2.5) }}",
        "{{ '{:>9}|{{{}}}'.format('a', xs) }}{{ '**%s**' % 'a' }}{{ 'a'.center(5) }}{{ xs | join(', ') }}",
        "{{ xs | map('string') | list }}{{ xs | select('odd') | list }}{{ (xs | map('abs')) is string }}",
        "{{ 1700000000 | string }}{{ [2 ** 60] | first | tojson }}{{ none | default('x') }}{{ xs | sum }}",
        "{% autoescape true %}{{ '<' ~ ('<' | safe) }}{% endautoescape %}{{ '<' ~ 1 ~ none ~ xs }}",
        "{% filter upper %}{% set x %}a{% endset %}{{ x }}{% endfilter %}{% block b %}1{% endblock %}{{ self.b() }}",
    ],
)
def test_bounded_operations_have_jinjas_values(expression):
    from jinja2 import sandbox

    plain = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    plain.filters["tojson"] = ChatTemplate("")._template.environment.filters["tojson"]
    expected = plain.from_string(expression).render(xs=[1, 2, 3])
    assert ChatTemplate(expression).render([], xs=[1, 2, 3]) == expected


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

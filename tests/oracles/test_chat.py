"""Renderings of chat templates, and functions as JSON schemas, by transformers: the same."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pastkey.errors import InputError
from pastkey.runtime.text.chat_template import ChatTemplate
from pastkey.runtime.text.tools import tool_schemas

from ..runtime.test_chat_tools import PLAIN
from ..runtime.text.test_chat_template import TEMPLATES, TOKENS

transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
exceptions = pytest.importorskip("jinja2").exceptions
render_jinja_template = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template

_WORDS = st.text(max_size=5) | st.sampled_from(
    ["</think>\nyes", ' a"b\n', "{{ x }}", "é\t日🙂", "<b>&'\"", "<tool_call>"]
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats(allow_nan=False, allow_infinity=False) | _WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_WORDS, inner, max_size=2),
    max_leaves=4,
)


def _dict(*words: str, **fields: Any) -> Any:
    return st.fixed_dictionaries(fields | dict.fromkeys(words, _WORDS))


_CALLED = _dict("name", arguments=st.dictionaries(_WORDS, _JSON, max_size=2))
_CALL = _dict(type=st.just("function"), id=st.integers(0, 999).map(str), function=_CALLED)
_PART = _dict("text", type=st.just("text"))
_MESSAGE = st.one_of(
    _dict("content", role=st.sampled_from(["user", "system"])),
    _dict("content", role=st.just("assistant")),
    _dict("content", "reasoning", role=st.just("assistant")),
    _dict(role=st.just("assistant"), content=_WORDS | st.none(), tool_calls=st.lists(_CALL, max_size=2)),
    _dict("content", role=st.just("tool"), name=st.just("f"), tool_call_id=st.just("1")),
    _dict(role=st.just("user"), content=st.lists(_PART)),
)
_TALK = st.lists(_WORDS, min_size=1, max_size=4).map(
    lambda texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
)
_FIELDS = _dict(type=st.just("object"), properties=st.dictionaries(_WORDS, _JSON, max_size=2))
_TOOL = _dict(type=st.just("function"), function=_dict("name", "description", parameters=_FIELDS))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_rendering_is_that_of_transformers(name):
    template = ChatTemplate(TEMPLATES[name], TOKENS)
    agreed: list[bool] = []

    @settings(max_examples=60, deadline=None)
    @given(
        messages=st.lists(_MESSAGE, min_size=1, max_size=5) | _TALK,
        tools=st.none() | st.lists(_TOOL, max_size=2),
        documents=st.none() | st.lists(st.dictionaries(_WORDS, _WORDS, max_size=2), max_size=2),
        variables=st.sampled_from([{}, {"thinking": False}, {"date_string": "today", "mode": "slow"}]),
        ends=st.booleans(),
    )
    def check(messages, tools, documents, variables, ends):
        more: dict[str, Any] = {"tools": tools, "documents": documents, "add_generation_prompt": ends}
        more |= variables | TOKENS
        try:
            rendered = render_jinja_template([messages], chat_template=TEMPLATES[name], **more)
        except (exceptions.TemplateError, TypeError):  # a message that the template does not accept, nobody accepts
            with pytest.raises(InputError, match="the chat template does not accept this conversation"):
                template.render(messages, **more)
            return
        assert template.render(messages, **more) == rendered[0][0]
        agreed.append(True)

    check()
    assert len(agreed) > 5


def test_a_final_message_is_continued_as_transformers_does():
    templates = [PLAIN, "{% for m in messages %}<{{ m.content | trim }}>{% endfor %}", "{{ messages[-1].content }}"]
    for template in templates:
        for content in ("abc", " abc ", "abc\n", ""):
            messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
            expected = render_jinja_template([messages], chat_template=template, continue_final_message=True)[0][0]
            assert ChatTemplate(template).render(messages, continue_final_message=True) == expected


def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C") -> str:
    """Tells the weather.

    Args:
        city: Which one,
            with its country.
        days: How far: at most 9.
        unit: Of the temperature.

    Returns:
        A sentence.
    """
    return f"{city} {days} {unit}"


def everything(
    a: float, b: bool, c: list[int], d: dict[str, float], e: str | None, f: list[Any], g: dict[str, Any],
    h: int | str = 3,
) -> None:  # fmt: skip
    """Does it.

    Args:
        a: A.
        b: B.
        c: C.
        d: D.
        e: E.
        f: F.
        g: G.
        h: H.
    """


@pytest.mark.parametrize("function", [weather, everything])
def test_the_schema_is_that_of_transformers(function):
    expected = transformers.utils.get_json_schema(function)
    expected["function"].pop("return", None)
    found = tool_schemas([function])[0]
    properties = found["function"]["parameters"]["properties"]
    union = properties.get("h", {})
    if "anyOf" in union:  # transformers writes a union of plain types in short
        properties["h"] = {"type": ["integer", "string"], "description": union["description"]}
    assert found == expected

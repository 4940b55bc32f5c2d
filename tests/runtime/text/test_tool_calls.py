"""Tool calls in the forms of the models that are known, and text in any other."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pastkey.runtime.text.tool_calls import parse_tool_calls, tool_call_form

CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
OTHER = {"name": "time", "arguments": {}}
HERMES = "<tool_call>\n" + json.dumps(CALL) + "\n</tool_call>"
LLAMA = '{"name": "weather", "parameters": {"city": "Oslo"}}'
MISTRAL = "[TOOL_CALLS] [" + json.dumps(CALL) + "]"


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("... within <tool_call></tool_call> XML tags: {{ tools }}", "hermes"),
        ("<tool_call>\n<function=name>\n<parameter=x>", None),
        ("{% if message.role == 'ipython' %}{{ '<|python_tag|>' }}", "llama3"),
        ("""ipython {{- '{"name": "' + name + '", "parameters": ' }}""", "llama3"),
        ("{{ '[TOOL_CALLS] [' }}[AVAILABLE_TOOLS]", "mistral"),
        ("{{ message.content }}", None),
    ],
)
def test_a_form_is_known_by_the_template(template, form):
    assert tool_call_form(template) == form


@pytest.mark.parametrize(
    ("form", "text", "said", "calls"),
    [
        ("hermes", f"I look.\n{HERMES}\n{HERMES.replace('Oslo', 'Rome')}\n", "I look.", [CALL, "Rome"]),
        ("hermes", HERMES.removesuffix("</tool_call>"), "", [CALL]),
        ("hermes", f"<tool_call>[{json.dumps(CALL)}, {json.dumps(OTHER)}]</tool_call>", "", [CALL, OTHER]),
        ("hermes", '<tool_call>{"name": "time"}</tool_call>', "", [OTHER]),
        ("hermes", '<tool_call>{"name": "time", "arguments": ""}</tool_call>', "", [OTHER]),
        ("hermes", '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}</tool_call>', "", [CALL]),
        ("llama3", f"<|python_tag|>{LLAMA}", "", [CALL]),
        ("llama3", f"Well. <|python_tag|>{LLAMA}; {LLAMA}", "Well.", [CALL, CALL]),
        ("mistral", f"Yes. {MISTRAL}", "Yes.", [CALL]),
        ("mistral", '[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]time[ARGS]{}', "", [CALL, OTHER]),
        ("mistral", '[TOOL_CALLS]weather[CALL_ID]abc123456[ARGS]{"city": "Oslo"}', "", [CALL]),
    ],
)
def test_calls_are_read(form, text, said, calls):
    expected = [call if isinstance(call, dict) else {"name": "weather", "arguments": {"city": call}} for call in calls]
    assert parse_tool_calls(text, form, ["weather", "time"]) == (said, expected)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", "<tool_call>{cut"),
        ("hermes", HERMES + " and more"),
        ("hermes", HERMES + "<tool_call>{}</tool_call>"),
        ("hermes", "<tool_call>3</tool_call>"),
        ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "a", "arguments": [1]}</tool_call>'),
        ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>"),
        ("hermes", LLAMA),
        ("hermes", HERMES.replace('"Oslo"', "NaN")),
        ("hermes", HERMES.replace("Oslo", "\\ud800")),
        ("hermes", HERMES.replace('"Oslo"', "[" * 200 + "]" * 200)),
        ("llama3", LLAMA.replace("weather", "unknown")),
        ("llama3", LLAMA + " is what I would say"),
        ("llama3", "[1]"),
        ("llama3", ""),
        ("llama3", "<|python_tag|>print(1)"),
        ("mistral", "[TOOL_CALLS] weather"),
        (None, HERMES),
        ("hermes", "<tool_call>[]</tool_call>"),
        ("mistral", "[TOOL_CALLS] []"),
    ],
)
def test_what_is_in_no_form_is_text(form, text):
    assert parse_tool_calls(text, form, ["weather"]) == (text, [])


def test_many_calls_take_no_quadratic_time():
    text = LLAMA * 80_000
    started = time.process_time()
    assert len(parse_tool_calls(text, "llama3", ["weather"])[1]) == 80_000
    assert time.process_time() - started < 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(
    calls=st.lists(st.tuples(st.text(min_size=1), st.dictionaries(st.text(), JSON, max_size=3)), min_size=1, max_size=3)
)
def test_any_arguments_come_back(calls):
    written = [{"name": name, "arguments": arguments} for name, arguments in calls]
    texts = [json.dumps(call) for call in written]
    marks = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
    if any(mark in text for text in texts for mark in marks):
        return
    hermes = "".join(f"<tool_call>{text}</tool_call>" for text in texts)
    assert parse_tool_calls(hermes, "hermes") == ("", written)
    assert parse_tool_calls(f"[TOOL_CALLS] [{', '.join(texts)}]", "mistral") == ("", written)
    assert parse_tool_calls("<|python_tag|>" + ";".join(texts), "llama3") == ("", written)


@given(st.text(st.sampled_from('<tool_call>/{}[]"name:,TOOL_CALLS ')), st.sampled_from(["hermes", "llama3", "mistral"]))
def test_no_text_is_an_error(text, form):
    said, calls = parse_tool_calls(text, form, ["name"])
    assert calls or said == text

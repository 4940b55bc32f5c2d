"""Tool calls in the forms of the models that are known, and text in any other, whole and in pieces."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pastkey.runtime.text.tool_call_stream import ToolCallReader
from pastkey.runtime.text.tool_calls import Form, parse_tool_calls, tool_call_form

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
    text = LLAMA * 20_000
    started = time.process_time()
    assert len(parse_tool_calls(text, "llama3", ["weather"])[1]) == 20_000
    assert time.process_time() - started < 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40)
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


# --- while they are written -----------------------------------------------------------------------------------------
KNOWN = ["w", "v"]
ANSWERS: list[tuple[Form | None, str]] = [
    ("hermes", 'so \n<tool_call>\n{"name": "w", "arguments": {"a": "}\\"{\\\\", "b": {"c": 1}}}\n</tool_call>'),
    ("hermes", '<tool_call>{"name": "w", "arguments": {}}</tool_call>\n<tool_call>{"name": "z", "arguments": {}}'),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "w"}</tool_call>'),
    ("hermes", "a < b <tool"),
    ("hermes", " so "),
    ("hermes", "so <tool_call>nothing"),
    ("llama3", '{"name": "w", "parameters": {"a": 1}}; {"name": "v", "parameters": {}}'),
    ("llama3", 'so <|python_tag|>{"name": "z", "parameters": {"a": 1}}'),
    ("llama3", '{"name": "z", "parameters": {"a": 1}}'),
    ("llama3", ' {"nam": 1} and so on'),
    ("mistral", 'so[TOOL_CALLS] [{"name": "w", "arguments": {"a": 1}}, {"name": "v", "arguments": {}}]'),
    ("mistral", '[TOOL_CALLS]w[ARGS]{"a": 1}[TOOL_CALLS]v[CALL_ID]x9[ARGS]{"b": 2}'),
    (None, "a <tool_call> b "),
]


@pytest.mark.parametrize(("form", "text"), ANSWERS)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_content_and_calls_are_those_of_the_whole(form, text, size):
    reader = ToolCallReader(form, KNOWN)
    pieces = [reader.push(text[start : start + size]) for start in range(0, len(text), size)]
    rest, late, said, calls = reader.end()
    assert (said, calls) == parse_tool_calls(text, form, KNOWN)
    assert "".join(pieces) + rest == said
    assert [(call.index, call.name, json.loads(call.arguments)) for call in late] == [
        (number, call["name"], call["arguments"]) for number, call in enumerate(calls)
    ]


def test_content_is_told_up_to_a_call_and_a_call_that_is_cut_off_is_text():
    reader = ToolCallReader("hermes", KNOWN)
    cut = ' <tool_call>{"name": "w", "arguments": {"a'
    assert [reader.push(text) for text in ("so ", " go <tool", cut[len(" <tool") :])] == ["so", "  go", ""]
    assert reader.end() == (cut, [], "so  go" + cut, [])

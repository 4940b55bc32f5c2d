"""The parts of tool calls are those of the whole answer, however the text is cut into pieces."""

from __future__ import annotations

import json

import pytest

from pastkey.runtime.text.tool_call_stream import ToolCallReader
from pastkey.runtime.text.tool_calls import Form, parse_tool_calls

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
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_content_and_calls_are_those_of_the_whole(form, text, size):
    reader = ToolCallReader(form, KNOWN)
    pieces = [reader.push(text[start : start + size]) for start in range(0, len(text), size)]
    rest, late, said, calls = reader.end()
    assert (said, calls) == parse_tool_calls(text, form, KNOWN)
    assert "".join(content for content, _ in pieces) + rest == said
    told: dict[int, list[str]] = {}
    for part in [part for _, parts in pieces for part in parts] + late:
        if part.name is not None:
            assert part.index == len(told)
            told[part.index] = [part.name, ""]
        told[part.index][1] += part.arguments
    assert [(name, json.loads(arguments)) for name, arguments in told.values()] == [
        (call["name"], call["arguments"]) for call in calls
    ]


def test_a_call_is_told_while_it_is_written():
    reader = ToolCallReader("hermes", KNOWN)
    assert reader.push('so <tool_call>{"name": "w", "arguments": {"a')[0] == "so"
    content, (part,) = reader.push('": 1')
    assert (content, part.index, part.name, part.arguments) == ("", 0, None, '": 1')


def test_a_call_that_is_cut_off_makes_the_whole_answer_text():
    reader = ToolCallReader("hermes", KNOWN)
    text = 'so <tool_call>{"name": "w", "arguments": {"a'
    assert [(part.name, part.arguments) for part in reader.push(text)[1]] == [("w", '{"a')]
    assert reader.end() == ("", [], text, [])
